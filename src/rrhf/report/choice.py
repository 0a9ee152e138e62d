"""Which of many samples stand on the page: the extremes, and the rest drawn evenly from the least to the largest."""

from __future__ import annotations

from collections.abc import Sequence

EXTREMES = 0.1  # share of the page for the largest values, and as much for the smallest


def choose(values: Sequence[float | None], sizes: Sequence[int], most: int, budget: int) -> list[int]:
    """The places of at most ``most`` samples that take at most ``budget`` bytes together, in order.

    Where all do not fit, the largest and the smallest values stay, so that whoever looks for them finds those of the
    whole file; the others are taken evenly over the order of their values (a stratified sample, whose strata hold
    equally many). Samples without a value are strata of their own.

    Args:
        values: of every sample; None where it has none.
        sizes: in bytes on the page.
    """
    most = min(most, len(values))
    while most > 1:
        chosen = _stratified(values, most)
        taken = sum(sizes[place] for place in chosen)
        if taken <= budget:
            return chosen
        most = min(most - 1, int(most * budget / taken))
    return list(range(len(values)))[:1]


def _stratified(values: Sequence[float | None], most: int) -> list[int]:
    if most >= len(values):
        return list(range(len(values)))
    known = sorted((place for place, value in enumerate(values) if value is not None), key=lambda p: (values[p], p))
    ends = min(int(most * EXTREMES), len(known) // 2)
    middle = [*known[ends : len(known) - ends], *(place for place, value in enumerate(values) if value is None)]
    room = most - 2 * ends
    even = [middle[int((number + 0.5) * len(middle) / room)] for number in range(room)]
    return sorted({*known[:ends], *known[len(known) - ends :], *even})
