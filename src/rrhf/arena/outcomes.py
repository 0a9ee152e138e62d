"""Votes and rankings as one thing: what a rater said of two systems on a query."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from rrhf.arena.votes import Ranking, Vote
from rrhf.evaluation.agreement import outcome_of

Unit = tuple[str, str, str]  # the query and the two systems, in the study's order: what several raters may have judged


@dataclass(frozen=True)
class Outcome:
    """``label``: win, tie or lose of system a against b on a query; a stands before b in the study's order."""

    rater: str
    query: str
    a: str
    b: str
    label: str

    @property
    def unit(self) -> Unit:
        return self.query, self.a, self.b


def systems_of(votes: Sequence[Vote], rankings: Sequence[Ranking]) -> list[str]:
    """The systems that were shown, by name."""
    return sorted({s for vote in votes for s in (vote.left, vote.right)} | {s for one in rankings for s in one.ranks})


def outcomes(votes: Sequence[Vote], rankings: Sequence[Ranking], systems: Sequence[str]) -> list[Outcome]:
    """Each vote on a pair, and each pair of a ranking, in their order.

    Skipped pairs and attention checks are none: a spoilt response says nothing of its system.

    Args:
        systems: in the study's order, which is that of a and b.
    """
    place = {name: number for number, name in enumerate(systems)}
    return [*_of_votes(votes, place), *_of_rankings(rankings, place)]


def _of_votes(votes: Sequence[Vote], place: Mapping[str, int]) -> Iterator[Outcome]:
    values = {"left": (1.0, 0.0), "tie": (0.5, 0.5), "right": (0.0, 1.0)}
    for vote in votes:
        if vote.choice in values and vote.spoilt is None:
            said = dict(zip((vote.left, vote.right), values[vote.choice], strict=True))
            a, b = sorted(said, key=place.__getitem__)
            yield Outcome(vote.rater, vote.query, a, b, outcome_of(said[a], said[b]))


def _of_rankings(rankings: Sequence[Ranking], place: Mapping[str, int]) -> Iterator[Outcome]:
    for one in rankings:
        for a, b in combinations(sorted(one.ranks, key=place.__getitem__), 2):
            yield Outcome(one.rater, one.query, a, b, outcome_of(-one.ranks[a], -one.ranks[b]))


def by_unit(found: Sequence[Outcome]) -> dict[Unit, dict[str, str]]:
    """What was judged → rater → label."""
    units: dict[Unit, dict[str, str]] = {}
    for outcome in found:
        units.setdefault(outcome.unit, {})[outcome.rater] = outcome.label
    return units
