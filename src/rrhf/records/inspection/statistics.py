"""Means, shares, percentiles, histograms and correlations; None where there is nothing to take them of."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

BINS = 30


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: Sequence[float]) -> float:
    """The standard deviation of a population."""
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / len(values))


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@dataclass(slots=True)
class Correlation:
    """Pearson's r of pairs in one pass: their sums, centred as they grow (Welford)."""

    n: int = 0
    means: list[float] = field(default_factory=lambda: [0.0, 0.0])
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    product: float = 0.0

    def add(self, first: float, second: float) -> None:
        self.n += 1
        before = first - self.means[0], second - self.means[1]
        self.means[0] += before[0] / self.n
        self.means[1] += before[1] / self.n
        self.squares[0] += before[0] * (first - self.means[0])
        self.squares[1] += before[1] * (second - self.means[1])
        self.product += before[0] * (second - self.means[1])

    def result(self) -> float | None:
        """Return Pearson's r, None where one side does not vary."""
        scale = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        return self.product / scale if scale > 0 else None


def summarise_lengths(counts: Counter[int]) -> dict[str, Any] | None:
    """Return mean, median, 95th percentile and maximum of lengths, each counted so many times.

    Percentiles are the nearest rank, so always a length that occurs.
    """
    total = counts.total()
    if not total:
        return None
    ordered = sorted(counts.items())
    return {
        "mean": sum(length * count for length, count in ordered) / total,
        "p50": _percentile(ordered, total, 50),
        "p95": _percentile(ordered, total, 95),
        "max": ordered[-1][0],
    }


def _percentile(ordered: list[tuple[int, int]], total: int, percent: int) -> int:
    rank = -(-total * percent // 100)
    for length, count in ordered:
        rank -= count
        if rank <= 0:
            return length
    return ordered[-1][0]


def histogram(values: Collection[float], weights: Iterable[int] | None = None) -> dict[str, Any] | None:
    """Return ``edges`` (one more than bins) and ``counts`` of values, each counted ``weights`` times (once).

    Bins of whole numbers hold equally many of them: others would show teeth that are not in the data.
    """
    if not values:
        return None
    low, high = min(values), max(values)
    if isinstance(low, int) and isinstance(high, int):
        width: float = -(-(high - low + 1) // BINS)
        bins, start = int((high - low) // width) + 1, low - 0.5
    else:
        width, bins, start = (high - low) / BINS or 1.0, BINS if high > low else 1, low if high > low else low - 0.5
    counts = [0] * bins
    for value, count in zip(values, weights or itertools.repeat(1), strict=False):
        counts[min(int((value - start) / width), bins - 1)] += count
    return {"edges": [start + width * i for i in range(bins + 1)], "counts": counts}
