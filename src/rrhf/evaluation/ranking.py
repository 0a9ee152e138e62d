"""How well rewards rank responses: accuracy on pairs, Kendall's τ on lists, calibration. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from rrhf.common.scores import score_levels
from rrhf.evaluation.metrics import paired_bootstrap

Ranked = tuple[Sequence[float], Sequence[float]]  # of one query's k responses: true scores r, and rewards R


def pair_margins(scores: Sequence[float], rewards: Sequence[float]) -> list[float]:
    """R_better − R_worse of every pair whose true scores differ; a right one is above 0."""
    levels = score_levels(scores)
    return [
        (rewards[i] - rewards[j]) * (1 if levels[i] > levels[j] else -1)
        for i, j in combinations(range(len(levels)), 2)
        if levels[i] != levels[j]
    ]


def right(margins: Sequence[float]) -> float:
    """How many pairs are ordered rightly; a pair of equal rewards counts half."""
    return sum(0.5 if margin == 0 else float(margin > 0) for margin in margins)


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's τ_b of two rankings of the same k things; None where one of them ties everything.

    τ_b = (concordant − discordant) / √((pairs untied in the first) · (pairs untied in the second)). Equal scores are
    those of ``rrhf.common.scores``.
    """
    a, b = score_levels(first), score_levels(second)
    concordant = untied_a = untied_b = 0
    for i, j in combinations(range(len(a)), 2):
        apart_a, apart_b = a[i] - a[j], b[i] - b[j]
        untied_a += apart_a != 0
        untied_b += apart_b != 0
        order = apart_a * apart_b
        concordant += (order > 0) - (order < 0)
    return concordant / math.sqrt(untied_a * untied_b) if untied_a and untied_b else None


def calibration(margins: Sequence[float], bins: int = 10) -> tuple[list[dict[str, float]], float]:
    """Whether P(the one with the higher reward is better) = σ(|R_i − R_j|), as Bradley–Terry says, is how often it is.

    Args:
        margins: R_better − R_worse of pairs.
        bins: of equally many pairs each, but for the last.

    Returns:
        The bins with ``confidence`` (the mean σ), ``accuracy`` and ``n``, from the least sure to the surest; and the
        expected calibration error, Σ n · |confidence − accuracy| / Σ n.
    """
    ordered = sorted(margins, key=abs)
    size = max(1, math.ceil(len(ordered) / bins))
    out: list[dict[str, float]] = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        confidence = sum(1 / (1 + math.exp(-abs(margin))) for margin in part) / len(part)
        out.append({"confidence": confidence, "accuracy": right(part) / len(part), "n": len(part)})
    error = sum(bin_["n"] * abs(bin_["confidence"] - bin_["accuracy"]) for bin_ in out) / max(len(ordered), 1)
    return out, error


def ranking_report(ranked: Sequence[Ranked], seed: int = 0) -> dict[str, object]:
    """All of it for held-out queries: ``accuracy``, ``kendall_tau`` (of queries with three responses or more; None
    without such), ``calibration`` and ``calibration_error``.

    ``accuracy`` is, as in ``rrhf.evaluation.pairs``, the mean over queries of the share of their pairs that is ordered
    rightly. Intervals are of the bootstrap over queries.

    Raises:
        ValueError: no query has two responses with different scores.
    """
    margins = [pair_margins(*query) for query in ranked]
    shares = [right(m) / len(m) for m in margins if m]
    taus = [tau for query in ranked if len(query[0]) > 2 and (tau := kendall_tau(*query)) is not None]
    bins, error = calibration([margin for query in margins for margin in query])
    return {
        "queries": len(shares),
        "pairs": sum(map(len, margins)),
        "accuracy": paired_bootstrap(shares, seed),
        "kendall_tau": {**paired_bootstrap(taus, seed), "n": len(taus)} if taus else None,
        "calibration": bins,
        "calibration_error": error,
    }
