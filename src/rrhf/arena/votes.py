"""What raters said: the one form in which votes go from the store to results and exports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Choice = Literal["left", "tie", "right", "skip"]


@dataclass(frozen=True)
class Vote:
    """One rater's last word on one pair of responses.

    Attributes:
        rater: the rater's name, not the secret of the link.
        pair: the pair's id in the study.
        query: the id of the record that the pair is of.
        left, right: the systems whose responses were shown on each side.
        choice: the better side, "tie", or "skip" (counts for nothing but progress).
        why: the rater's remark, or "".
        at: when the vote was stored, in seconds since the epoch.
        common: whether every rater sees this pair.
        spoilt: for an attention check, the side whose response was spoilt on purpose; else None.
    """

    rater: str
    pair: str
    query: str
    left: str
    right: str
    choice: Choice
    why: str
    at: float
    common: bool
    spoilt: Literal["left", "right"] | None


@dataclass(frozen=True)
class Ranking:
    """One rater's order of k responses to one query.

    Attributes:
        rater, query, at, why: as in ``Vote``.
        ranks: system → place, 1 the best; equal places are ties.
    """

    rater: str
    query: str
    ranks: dict[str, int]
    at: float
    why: str = ""
