"""Which scores of a query are equal: the one rule of losses, inspection and report.

Scores that come of sums differ in their last bits (0.1 + 0.2 against 0.3). Two scores are equal where they differ by at
most ``SCORE_TOLERANCE`` times the larger magnitude, and so are all scores of a chain of equal ones. Values that cancel
to nearly 0 are not covered: 0 is equal to 0 alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

SCORE_TOLERANCE = 1e-9  # relative


def score_levels(scores: Iterable[float]) -> list[int]:
    """The level of every score: 0 for the lowest, one more for each higher score that is not equal to the one below.

    Args:
        scores: of one query's responses, none missing and none NaN.
    """
    values = list(scores)
    levels, level = [0] * len(values), 0
    order = sorted(range(len(values)), key=values.__getitem__)
    for below, index in pairwise(order):
        level += not math.isclose(values[below], values[index], rel_tol=SCORE_TOLERANCE)
        levels[index] = level
    return levels
