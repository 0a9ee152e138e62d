"""Rewards of unlike scales brought to one before they are summed: (R − mean) / standard deviation.

Mean and deviation are those of a query's responses, or of all responses of the data. Scores that were equal
(``common/scores.py``) stay equal, a missing one stays missing, and rewards that are all equal become 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rrhf.common.scores import SCORE_TOLERANCE, score_levels
from rrhf.records.record import Record

NORMALISATIONS = {
    "none": "as it is",
    "query": "over the responses of each query",
    "data": "over all responses of the data",
}


@dataclass
class Moments:
    """Number, mean and sum of squared deviations of the values so far (Welford 1962); nothing else is kept."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        change = value - self.mean
        self.mean += change / self.count
        self.squares += change * (value - self.mean)

    @property
    def deviation(self) -> float:
        """The standard deviation, with the number of values in the denominator; 0 where all are equal but for bits."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return deviation if deviation > SCORE_TOLERANCE * abs(self.mean) else 0.0


def data_moments(records: Iterable[Record], names: Sequence[str]) -> dict[str, Moments]:
    """The moments of each named reward over all responses that have it, in one pass.

    The same records in the same order give the same bits.
    """
    moments = {name: Moments() for name in names}
    for record in records:
        for name, found in moments.items():
            for value in record.rewards.get(name, ()):
                if value is not None:
                    found.add(value)
    return moments


def normalised(values: Sequence[float | None], moments: Moments | None = None) -> list[float | None]:
    """(R − mean) / deviation of each response of a query; None stays None.

    Args:
        values: one a response of one query.
        moments: of the data; None: of these values.
    """
    scored = [value for value in values if value is not None]
    same = _representatives(scored)  # what differs in the last bit alone would differ in more around a mean near it
    if moments is None:
        moments = Moments()
        for value in scored:
            moments.add(same[value])
    mean, deviation = moments.mean, moments.deviation

    def scaled(value: float) -> float:
        return (same[value] - mean) / deviation if deviation else 0.0

    return [None if value is None else scaled(value) for value in values]


def _representatives(values: Sequence[float]) -> dict[float, float]:
    """Each value → the lowest of those that are equal to it."""
    levels = score_levels(values)
    lowest: dict[int, float] = {}
    for value, level in zip(values, levels, strict=True):
        lowest[level] = min(value, lowest.get(level, value))
    return {value: lowest[level] for value, level in zip(values, levels, strict=True)}
