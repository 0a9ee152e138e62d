"""Votes and rankings as scored records, which `rrhf train` takes as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from rrhf.arena.outcomes import Outcome, outcomes
from rrhf.arena.votes import Ranking, Vote
from rrhf.common.errors import UserError, nearest
from rrhf.evaluation.agreement import value_of
from rrhf.records.record import Record
from rrhf.rewards.people import AGGREGATES, Values

REWARD = "arena"  # what the scores are called among a record's rewards


def voted_records(
    studied: Sequence[Record],
    votes: Sequence[Vote],
    rankings: Sequence[Ranking] = (),
    *,
    aggregate: str = "mean",
    without: Collection[str] = (),
) -> Iterator[Record]:
    """The records of which something was said, with scores by what was said of them alone.

    Each vote is a ranking of two responses, with a tie or without; skips and attention checks are none. Several become
    one score a response as those of ``people:FILE`` do (``rrhf.rewards.people``):

    - ``mean``: the mean share of the others that the response beats, a tie is half; for a pair, of its raters.
    - ``plackett-luce``: the strengths of the Plackett–Luce model under a standard normal prior; of pairs that is
      Bradley–Terry. Ties do not compete.

    A response of which nothing was said scores None.

    Args:
        studied: one record a query; ``sources`` are the systems.
        without: raters whose word does not count.

    Raises:
        UserError: there is no such aggregate, or nothing was said.
    """
    if aggregate not in AGGREGATES:
        raise UserError(f"--aggregate {aggregate}: {nearest(aggregate, AGGREGATES)}")
    said: dict[str, list[dict[str, float]]] = {}
    systems = list(dict.fromkeys(name for record in studied for name in record.sources))
    for outcome in outcomes([vote for vote in votes if vote.rater not in without], [], systems):
        said.setdefault(outcome.query, []).append(_of_pair(outcome))
    for ranking in rankings:
        if ranking.rater not in without:
            said.setdefault(ranking.query, []).append({name: -place for name, place in ranking.ranks.items()})
    if not said:
        raise UserError("nobody has voted yet: there is nothing to export")
    for record in studied:
        if record.id in said:
            scores = _scores(record, said[record.id], aggregate)
            yield replace(record, scores=scores, rewards={**record.rewards, REWARD: scores})


def _of_pair(outcome: Outcome) -> dict[str, float]:
    value = value_of(outcome.label)
    return {outcome.a: value, outcome.b: 1 - value}


def _scores(record: Record, said: Sequence[Mapping[str, float]], aggregate: str) -> list[float | None]:
    place = {name: index for index, name in enumerate(record.sources)}
    judgements: list[Values] = [{place[name]: value for name, value in one.items()} for one in said]
    values = AGGREGATES[aggregate](judgements, "rank")
    return [values.get(index) for index in range(len(record.responses))]
