"""What an evaluation counts: pure functions of numbers and texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rrhf.common.texts import cut_at_first

TURN_MARKERS = ("Human:", "Assistant:")  # of the HH dialogues

CHUNK = 2_000_000  # resampled values in memory at once


def paired_bootstrap(
    differences: Sequence[float], seed: int, samples: int = 10_000, level: float = 0.95
) -> dict[str, float]:
    """Return the mean of paired differences with its bootstrap interval.

    The pairs are resampled with replacement ``samples`` times, each time as many as there are; the interval holds
    the middle ``level`` of the resampled means (the percentile interval). Pairing takes the spread between prompts
    out of the comparison.

    Args:
        differences: d_n = R(x_n, π(x_n)) − R(x_n, ρ(x_n)), one a prompt.
        seed: of the resampling; the same seed gives the same interval.
        samples: how many resampled means.
        level: the interval's coverage, between 0 and 1.

    Raises:
        ValueError: there is no difference, or one is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError("the bootstrap needs finite differences, and at least one")
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // values.size)
    means = np.concatenate(
        [
            values[generator.integers(0, values.size, size=(min(rows, samples - start), values.size))].mean(axis=1)
            for start in range(0, samples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def distinct_n(texts_tokens: Sequence[Sequence[str]], n: int) -> float:
    """Return the share of different n-grams among all n-grams of all texts (Li et al. 2016); 0 where there is none."""
    grams = [tuple(tokens[i : i + n]) for tokens in texts_tokens for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def corpus_perplexity(total_nll: float, total_tokens: int) -> float:
    """Return exp(Σ −log P / Σ tokens), both sums over all responses.

    Raises:
        ValueError: there is no token, or the sum is not finite.
    """
    if total_tokens < 1 or not math.isfinite(total_nll):
        raise ValueError(f"no perplexity of {total_tokens} tokens with a negative log-likelihood of {total_nll}")
    return math.exp(total_nll / total_tokens)


def cut_at_turn(text: str, markers: Sequence[str] = TURN_MARKERS) -> str:
    """Cut a generation before the first marker of a new turn, and the white space there; others come back whole."""
    kept, cut = cut_at_first(text, markers)
    return kept.rstrip() if cut else text
