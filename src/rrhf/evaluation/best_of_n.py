"""Best-of-n at inference: what the best of m samples is worth, for every m up to n, from the same n samples.

Let a prompt's n independent samples be sorted by the reward that chooses, r_(1) ≤ … ≤ r_(n). Over all subsets of size
m, the best is sample i in C(i − 1, m − 1) of C(n, m), so

    V_m = Σ_i C(i − 1, m − 1) / C(n, m) · v_(i)

is the mean value of the best over all subsets, and an unbiased estimate of E[value of the best of m samples]; v is the
reward that chooses itself, or another one.

The best of n samples of ρ is a policy whose KL to ρ is at most log n − (n − 1)/n nats a response (arXiv 2401.01879).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from rrhf.common.scores import score_levels
from rrhf.evaluation.metrics import paired_bootstrap

Values = Sequence[float | None]


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n, an upper bound of KL(best of n ‖ ρ) in nats."""
    return math.log(n) - (n - 1) / n


def best_index(scores: Values) -> int | None:
    """The index of the highest score, the first of equals (``common.scores``); None where nothing is scored."""
    known = [(index, score) for index, score in enumerate(scores) if score is not None]
    levels = score_levels(score for _, score in known)
    return known[levels.index(max(levels))][0] if known else None


def values_of_best(scores: Values, values: Values) -> np.ndarray:
    """V_m for m = 1 … n' of one prompt.

    Args:
        scores: of its n samples, what chooses; of equals the first is chosen.
        values: of the same samples, what is measured.

    Returns:
        Array of shape (n',), where n' counts the samples that have both; the others are left out.
    """
    both = [(s, v) for s, v in zip(scores, values, strict=True) if s is not None and v is not None]
    levels = score_levels(score for score, _ in both)
    order = sorted(range(len(both)), key=lambda i: (levels[i], -i))
    return _weights(len(both)) @ np.array([both[i][1] for i in order], dtype=np.float64)


@lru_cache(maxsize=64)
def _weights(n: int) -> np.ndarray:
    """[m − 1, i − 1]: C(i − 1, m − 1) / C(n, m). Array of shape (n, n)."""
    rows = [[math.comb(i - 1, m - 1) / math.comb(n, m) for i in range(1, n + 1)] for m in range(1, n + 1)]
    return np.array(rows, dtype=np.float64).reshape(n, n)


def best_of_n_curve(
    scores: Sequence[Values], values: Sequence[Values], seed: int, samples: int = 10_000
) -> list[dict[str, Any]]:
    """The value of the best of m samples as a function of m, with its 95 % bootstrap interval over prompts.

    Args:
        scores, values: of every prompt's samples; see ``values_of_best``.
        seed, samples: of the bootstrap.

    Returns:
        A line for each m: ``n`` (m), ``mean``, ``low``, ``high``, ``prompts`` (those with at least m samples that are
        scored) and ``kl_bound``; as far as there is a prompt.
    """
    of_prompts = [values_of_best(chosen, measured) for chosen, measured in zip(scores, values, strict=True)]
    curve = []
    for m in range(1, max(map(len, of_prompts), default=0) + 1):
        means = [float(found[m - 1]) for found in of_prompts if len(found) >= m]
        curve.append({"n": m, **paired_bootstrap(means, seed, samples), "prompts": len(means), "kl_bound": kl_bound(m)})
    return curve
