"""What the votes of a study say: who wins, how surely, how far raters agree, and whom not to believe.

Pure functions of votes and rankings. Every query counts once in a comparison, however many raters saw it; intervals are
of the bootstrap over queries, with all that was said of each. A ranking of k responses counts as its k (k − 1) / 2
pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from rrhf.arena.outcomes import Outcome, Unit, by_unit, outcomes, systems_of
from rrhf.arena.raters import check_counts, rater_checks, side_bias
from rrhf.arena.votes import Ranking, Vote
from rrhf.evaluation.agreement import OUTCOMES, agreement, outcome_alpha, shares, value_of
from rrhf.evaluation.bradley_terry import Game, bradley_terry, unlinked
from rrhf.evaluation.metrics import paired_bootstrap

PAIR_SAMPLES = 2_000  # of the bootstrap of each two raters, who can be many

Judges = Mapping[str, Mapping[Unit, str]]  # reward model or judge → what it says of a against b


def study_results(
    votes: Sequence[Vote],
    rankings: Sequence[Ranking] = (),
    *,
    systems: Sequence[str] | None = None,
    judges: Judges | None = None,
    without: Sequence[str] = (),
    skipped: Mapping[str, int] | None = None,
    seed: int = 0,
    samples: int = 200,
) -> dict[str, Any]:
    """All numbers of a study.

    Args:
        votes, rankings: as they are kept; attention checks and skips too.
        systems: in the study's order; default: by name.
        judges: machines to hold people against (``rrhf.arena.machines``).
        without: raters whose word does not count; they are examined all the same.
        skipped: rater → how much was skipped; default: of the votes, since rankings do not tell.
        seed, samples: of the bootstraps; ``samples`` is of the strengths, which are fitted anew each time.

    Returns:
        systems, votes (that count), rankings, skipped, queries; comparisons and strengths, as ``live_results`` says;
        agreement: raters (``between_raters``), pairs ("one / other" → ``agreement``), judges (judge → "all raters" or
        a rater → ``agreement``); sides (``side_bias``); checks; raters: name → votes, rankings, skipped and what
        ``rater_checks`` says; flagged (raters), left_out, unlinked (groups of systems whose strengths say nothing of
        each other).

    Raises:
        UserError: the libraries of the extra ``judging`` are not installed.
    """
    names = list(systems) if systems is not None else systems_of(votes, rankings)
    told = outcomes(votes, rankings, names)
    counted = [outcome for outcome in told if outcome.rater not in without]
    units, kept = by_unit(counted), [vote for vote in votes if vote.rater not in without]
    skips = Counter(vote.rater for vote in votes if vote.choice == "skip") if skipped is None else Counter(skipped)
    raters = _raters(votes, rankings, skips, by_unit(told), seed)
    pairs = _by_pair(units, seed)
    return {
        "systems": names,
        "votes": sum(vote.choice != "skip" and vote.spoilt is None for vote in kept),
        "rankings": sum(one.rater not in without for one in rankings),
        "skipped": sum(number for rater, number in skips.items() if rater not in without),
        "queries": len({outcome.query for outcome in counted}),
        "comparisons": compared(counted, seed),
        "strengths": bradley_terry(_games(counted), seed, samples),
        "agreement": {
            "raters": between_raters(units, pairs, seed),
            "pairs": pairs,
            "judges": {name: _with_judge(said, counted, seed) for name, said in (judges or {}).items()},
        },
        "sides": side_bias(kept),
        "checks": check_counts(kept),
        "raters": raters,
        "flagged": [name for name, found in raters.items() if found["flags"]],
        "left_out": sorted(set(without) & set(raters)),
        "unlinked": unlinked(_games(counted)),
    }


def live_results(
    votes: Sequence[Vote],
    rankings: Sequence[Ranking] = (),
    *,
    systems: Sequence[str] | None = None,
    seed: int = 0,
    samples: int = 50,
) -> dict[str, Any]:
    """The part of ``study_results`` that an owner follows while raters vote, from fewer resamples.

    Returns:
        votes; comparisons: of two systems a and b their queries and votes, win, tie, lose (votes), win_share,
        tie_share, lose_share and win_rate (a tie is half), with intervals; strengths: system → its strength, with its
        interval.
    """
    names = list(systems) if systems is not None else systems_of(votes, rankings)
    counted = outcomes(votes, rankings, names)
    return {
        "votes": sum(vote.choice != "skip" and vote.spoilt is None for vote in votes),
        "comparisons": compared(counted, seed, samples=20 * samples),
        "strengths": bradley_terry(_games(counted), seed, samples),
    }


# --- systems -----------------------------------------------------------------------------------------------------


def compared(counted: Sequence[Outcome], seed: int = 0, samples: int = 10_000) -> list[dict[str, Any]]:
    """Each comparison's counts and shares, in the order in which they first were judged; see ``live_results``."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for outcome in counted:
        groups.setdefault((outcome.a, outcome.b), {}).setdefault(outcome.query, []).append(outcome.label)
    found = []
    for (a, b), by_query in groups.items():
        labels = Counter(label for said in by_query.values() for label in said)
        shown = {
            f"{name}_share": paired_bootstrap(
                [said.count(name) / len(said) for said in by_query.values()], seed, samples
            )
            for name in reversed(OUTCOMES)
        }
        rate = paired_bootstrap([_mean(said) for said in by_query.values()], seed, samples)
        counts = {name: labels[name] for name in reversed(OUTCOMES)}
        found.append(
            {"a": a, "b": b, "queries": len(by_query), "votes": labels.total(), **counts, **shown, "win_rate": rate}
        )
    return found


def _mean(labels: Sequence[str]) -> float:
    return sum(map(value_of, labels)) / len(labels)


def _games(counted: Sequence[Outcome]) -> dict[str, list[Game]]:
    """Query → one game a comparison, won by the mean of what its raters said."""
    games: dict[str, list[Game]] = {}
    for (query, a, b), said in by_unit(counted).items():
        games.setdefault(query, []).append((a, b, _mean(list(said.values()))))
    return games


# --- raters ------------------------------------------------------------------------------------------------------


def between_raters(
    units: Mapping[Unit, Mapping[str, str]], pairs: Mapping[str, Mapping[str, Any]], seed: int = 0
) -> dict[str, Any]:
    """How far raters agree on what at least two of them judged.

    Args:
        units: what was judged → rater → label.
        pairs: of raters → how far they agree.
        seed: of the bootstrap.

    Returns:
        n (things judged), same and not_contradicting (of two raters, as in Appendix D of the paper, with intervals),
        kappa (the mean of Cohen's over the pairs of raters that have one: Light 1971), krippendorff (nominal and
        ordinal); None where nothing was judged twice.
    """
    met = {unit: said for unit, said in units.items() if len(said) > 1}
    labels = [(unit[0], one, other) for unit, said in met.items() for one, other in combinations(said.values(), 2)]
    if not labels:
        return {"n": 0, "same": None, "not_contradicting": None, "kappa": None, "krippendorff": None}
    kappas = [found["kappa"] for found in pairs.values() if found["kappa"] is not None]
    return {
        "n": len(met),
        **shares(labels, seed),
        "kappa": sum(kappas) / len(kappas) if kappas else None,
        "krippendorff": outcome_alpha(list(met.values())),
    }


def _by_pair(units: Mapping[Unit, Mapping[str, str]], seed: int) -> dict[str, Any]:
    labels: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for (query, _, _), said in units.items():
        for one, other in combinations(sorted(said), 2):
            labels.setdefault((one, other), []).append((query, said[one], said[other]))
    return {f"{one} / {other}": agreement(labels[one, other], seed, PAIR_SAMPLES) for one, other in sorted(labels)}


def _with_judge(judge: Mapping[Unit, str], counted: Sequence[Outcome], seed: int) -> dict[str, Any]:
    labels: dict[str, list[tuple[str, str, str]]] = {"all raters": []}
    for outcome in counted:
        if outcome.unit in judge:
            pair = (outcome.query, outcome.label, judge[outcome.unit])
            labels["all raters"].append(pair)
            labels.setdefault(outcome.rater, []).append(pair)
    return {name: agreement(pairs, seed) for name, pairs in labels.items()}


def _raters(
    votes: Sequence[Vote],
    rankings: Sequence[Ranking],
    skips: Mapping[str, int],
    units: Mapping[Unit, Mapping[str, str]],
    seed: int,
) -> dict[str, Any]:
    voted = Counter(vote.rater for vote in votes if vote.choice != "skip" and vote.spoilt is None)
    ranked = Counter(one.rater for one in rankings)
    return {
        name: {"votes": voted[name], "rankings": ranked[name], "skipped": skips.get(name, 0), **found}
        for name, found in rater_checks(votes, units, seed).items()
    }
