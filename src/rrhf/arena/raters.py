"""Raters who do not read: attention checks, agreement with the others, and sides, each as a test with a stated rule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rrhf.arena.outcomes import Unit
from rrhf.arena.votes import Vote
from rrhf.common.imports import of_extra
from rrhf.evaluation.agreement import MISSING, value_of

CARELESS = 0.1  # the share of attention checks that a careful rater fails at most
LEVEL = 0.01  # a rater is flagged where a careful one would look like that less often
SHUFFLES = 10_000  # of labels among raters


def rater_checks(votes: Sequence[Vote], units: Mapping[Unit, Mapping[str, str]], seed: int = 0) -> dict[str, Any]:
    """What speaks against each rater.

    A rater is flagged as ``random`` where p < 0.01, p being how often a careful rater would look as bad or worse:

    - on attention checks: P(as many failures or more), each with a chance of 0.1; a tie is a failure, a skip is none;
    - in agreement with the others on what at least three raters judged: the share of shuffles, of what was said of each
      query among those who said it, in which the rater agrees no better with the others (a label against another
      counts 1, 0.5 with one tie, 0 for a contradiction);
    - where there are both, they are combined by Fisher's method.

    A rater is flagged as ``one side`` where left and right, which are drawn for every pair, are chosen so unequally
    that p < 0.01 in a two-sided binomial test, of 0.01 over the number of raters (Bonferroni): people may have a side
    that they like a little, and it does no harm, because sides are drawn.

    Args:
        votes: all, attention checks and skips too.
        units: what was judged → rater → label.
        seed: of the shuffles.

    Returns:
        Rater → checks (n, passed), agreement (n, with_others, p; None without such things), p (None: nothing to tell
        by), sides (``side_bias``), flags.
    """
    names = list(dict.fromkeys([*(vote.rater for vote in votes), *(name for unit in units.values() for name in unit)]))
    result: dict[str, Any] = {}
    for name in names:
        mine = [vote for vote in votes if vote.rater == name]
        checks = check_counts(mine)
        agreeing = agreement_with_others(name, units, seed)
        found = [_check_p(**checks)] if checks["n"] else []
        found += [agreeing["p"]] if agreeing else []
        sides = side_bias(mine)
        p = _combined(found)
        flags = ["random"] if p is not None and p < LEVEL else []
        flags += ["one side"] if sides["p"] is not None and sides["p"] < LEVEL / len(names) else []
        result[name] = {"checks": checks, "agreement": agreeing, "p": p, "sides": sides, "flags": flags}
    return result


def check_counts(votes: Sequence[Vote]) -> dict[str, int]:
    """``n`` attention checks that were not skipped, and how many were ``passed``: the whole response was chosen."""
    asked = [vote for vote in votes if vote.spoilt is not None and vote.choice != "skip"]
    return {"n": len(asked), "passed": sum(vote.choice not in ("tie", vote.spoilt) for vote in asked)}


def _check_p(n: int, passed: int) -> float:
    return float(of_extra("scipy.stats", MISSING).binom.sf(n - passed - 1, n, CARELESS))


def _combined(found: Sequence[float]) -> float | None:
    return float(of_extra("scipy.stats", MISSING).combine_pvalues(found, "fisher").pvalue) if found else None


def agreement_with_others(
    rater: str, units: Mapping[Unit, Mapping[str, str]], seed: int = 0, shuffles: int = SHUFFLES
) -> dict[str, Any] | None:
    """How a rater agrees with the others, against shuffles of the labels; None where no three judged the same.

    Where what was said of a query is careful raters', any of it could have been this rater's: so the rater's agreement
    is compared with what it were with another's labels, drawn for each query by itself, for all the pairs of it at once
    that the same raters judged: those of one ranking hang together. This is exact where all are careful; careless ones
    among the others make it milder, and of two raters nothing can be told.
    """
    own: list[float] = []
    choices: dict[tuple[str, tuple[str, ...]], Any] = {}  # query, raters → each rater's agreement over its pairs
    for unit, said in units.items():
        if rater in said and len(said) > 2:
            names = tuple(sorted(said))
            scores = _agreements([value_of(said[name]) for name in names])
            own.append(scores[names.index(rater)])
            choices[unit[0], names] = choices.get((unit[0], names), 0) + np.asarray(scores)
    if not own:
        return None
    generator = np.random.default_rng(seed)
    drawn = np.zeros(shuffles)
    for sums in choices.values():
        drawn += sums[generator.integers(0, len(sums), size=shuffles)]
    as_bad = int((drawn <= math.fsum(own) + 1e-9).sum())
    return {"n": len(own), "with_others": math.fsum(own) / len(own), "p": (1 + as_bad) / (1 + shuffles)}


def _agreements(values: Sequence[float]) -> list[float]:
    """Of each label of a thing: its mean agreement 1 − |v − v'| with the others."""
    counts = Counter(values)
    with_all = {one: sum(count * (1 - abs(one - other)) for other, count in counts.items()) for one in counts}
    return [(with_all[value] - 1) / (len(values) - 1) for value in values]  # without itself


def side_bias(votes: Sequence[Vote]) -> dict[str, Any]:
    """Whether the left response is chosen as often as the right one: sides are drawn, so without a bias it is.

    Ties, skips and attention checks say nothing of sides.

    Returns:
        left, right (votes), share (of left, with its exact 95 % interval), p (exact two-sided binomial test); the last
        two None without such a vote.
    """
    sides = [vote.choice for vote in votes if vote.choice in ("left", "right") and vote.spoilt is None]
    left = sides.count("left")
    if not sides:
        return {"left": 0, "right": 0, "share": None, "p": None}
    test = of_extra("scipy.stats", MISSING).binomtest(left, len(sides), 0.5)
    low, high = test.proportion_ci(0.95, "exact")
    share = {"mean": left / len(sides), "low": float(low), "high": float(high)}
    return {"left": left, "right": len(sides) - left, "share": share, "p": float(test.pvalue)}
