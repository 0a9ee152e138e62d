"""The losses of RRHF as naive loops over plain Python floats, written from the paper's equations alone.

``scores`` holds None where a response was not scored. Nothing here is shared with ``rrhf.losses``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Scores = Sequence[float | None]


def logprobs(sums: Sequence[float], lengths: Sequence[int], exponent: float = 1.0) -> list[float]:
    """Eq. 1: p_i = Σ_t log P / ‖y_i‖ (to the power of ``exponent``); an empty response counts as one token."""
    return [total / max(length, 1) ** exponent for total, length in zip(sums, lengths, strict=True)]


def lower(low: float, high: float, scores: Scores) -> bool:
    """r < r': above ``low`` and up to ``high`` lies a step of more than 1e-9 of the larger magnitude."""
    between = sorted(r for r in scores if r is not None and low <= r <= high)
    return any(above - below > 1e-9 * max(abs(below), abs(above)) for below, above in pairwise(between))


def pairs(scores: Scores) -> list[tuple[int, int]]:
    """Every (i, j) with r_i < r_j."""
    found = []
    for i, low in enumerate(scores):
        for j, high in enumerate(scores):
            if low is not None and high is not None and lower(low, high, scores):
                found.append((i, j))
    return found


def hinge(p: Sequence[float], scores: Scores, margin: float = 0.0, scale: float = 1.0) -> float:
    """Eq. 2: Σ_{r_i < r_j} max(0, p_i − p_j)."""
    total = 0.0
    for i, j in pairs(scores):
        total += max(0.0, p[i] - p[j])
    return total


def rank(scores: Scores, i: int) -> int:
    """1 for the best; responses of equal score share a rank."""
    steps = 0
    higher = sorted(r for r in scores if r is not None and r >= scores[i])  # type: ignore[operator]
    for below, above in pairwise(higher):
        steps += lower(below, above, scores)
    return 1 + steps


def brio(p: Sequence[float], scores: Scores, margin: float = 0.0, scale: float = 1.0) -> float:
    """BRIO: Σ max(0, p_i − p_j + (rank_i − rank_j) λ)."""
    total = 0.0
    for i, j in pairs(scores):
        total += max(0.0, p[i] - p[j] + (rank(scores, i) - rank(scores, j)) * margin)
    return total


def constant_margin(p: Sequence[float], scores: Scores, margin: float = 0.0, scale: float = 1.0) -> float:
    """SLiC: Σ max(0, p_i − p_j + λ)."""
    total = 0.0
    for i, j in pairs(scores):
        total += max(0.0, p[i] - p[j] + margin)
    return total


def logistic(p: Sequence[float], scores: Scores, margin: float = 0.0, scale: float = 1.0) -> float:
    """Bradley-Terry: Σ log(1 + e^−z), z = scale (p_j − p_i) − margin."""
    total = 0.0
    for i, j in pairs(scores):
        z = scale * (p[j] - p[i]) - margin
        total += math.log1p(math.exp(-z)) if z > 0 else -z + math.log1p(math.exp(z))
    return total


def listmle(p: Sequence[float], scores: Scores, margin: float = 0.0, scale: float = 1.0) -> float:
    """PRO: for each i the negative log-share of e^{s p_i} among itself and all responses of lower score."""
    total = 0.0
    for i, own in enumerate(scores):
        if own is None:
            continue
        rivals = [i] + [j for j, other in enumerate(scores) if other is not None and lower(other, own, scores)]
        top = max(scale * p[j] for j in rivals)
        total += top + math.log(sum(math.exp(scale * p[j] - top) for j in rivals)) - scale * p[i]
    return total


def none(p: Sequence[float], scores: Scores, margin: float = 0.0, scale: float = 1.0) -> float:
    """No ranking term."""
    return 0.0


RANKING = {
    "hinge": hinge,
    "margin": brio,
    "constant-margin": constant_margin,
    "logistic": logistic,
    "listmle": listmle,
    "none": none,
}


def with_ties(name: str, p: Sequence[float], scores: Scores, margin: float, scale: float, ties: str) -> float:
    """A pairwise loss under ``--ties``: every pair by itself, a tie under "half" as the mean of both directions."""
    total = 0.0
    for i, low in enumerate(scores):
        for j, high in enumerate(scores):
            if i == j or low is None or high is None:
                continue
            worse, better = lower(low, high, scores), lower(high, low, scores)
            steps = rank(scores, i) - rank(scores, j) if name == "margin" else 1
            pair = RANKING[name]([p[i], p[j]], [0.0, 1.0], steps * margin, scale)
            least = float(ties[7:]) if ties.startswith("margin:") else 0.0
            if worse and high - low >= least - 1e-9 * max(abs(low), abs(high), least):
                total += pair
            elif ties == "half" and not worse and not better:
                total += pair / 2
    return total


def best(scores: Scores) -> int | None:
    """Eq. 3: argmax_i r_i, the first of equals."""
    found = None
    for i, score in enumerate(scores):
        if score is not None and (found is None or lower(scores[found], score, scores)):  # type: ignore[arg-type]
            found = i
    return found


def sft(sums: Sequence[float], lengths: Sequence[int], scores: Scores, reduction: str = "sum") -> float:
    """Eq. 4: − Σ_t log P of the best response; with ``mean`` over its tokens."""
    i = best(scores)
    if i is None:
        return 0.0
    return -sums[i] if reduction == "sum" else -sums[i] / max(lengths[i], 1)


def rrhf(sums: Sequence[float], lengths: Sequence[int], scores: Scores) -> tuple[float, float, float]:
    """Eq. 5: (L, L_rank, L_ft)."""
    rank_loss = hinge(logprobs(sums, lengths), scores)
    fit = sft(sums, lengths, scores)
    return rank_loss + fit, rank_loss, fit


def released(sums: Sequence[float], padded_length: int, scores: Scores) -> tuple[float, float, float]:
    """(L, L_rank, L_ft) of the released code: both terms are divided by the width of the padded rows."""
    p = [total / padded_length for total in sums]
    rank_loss = hinge(p, scores)
    i = best(scores)
    fit = 0.0 if i is None else -sums[i] / padded_length
    return rank_loss + fit, rank_loss, fit
