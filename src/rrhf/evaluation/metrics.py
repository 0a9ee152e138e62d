"""What an evaluation counts: pure functions of numbers and texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rrhf.common.texts import cut_at_first
from rrhf.records.inspection.diversity import ngrams

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


def resamples(n: int) -> int:
    """How many resampled means a quick interval over ``n`` things takes: 10,000, fewer from 2,000 things on."""
    return max(1000, min(10_000, 10 * CHUNK // max(n, 1)))


def ratio_bootstrap(
    numerators: Sequence[float], denominators: Sequence[float], seed: int, samples: int | None = None
) -> dict[str, float]:
    """Return Σ numerators / Σ denominators with its 95 % percentile interval, both resampled together.

    With a query's sum of scores and number of responses it is the mean over responses, resampled by query; with a
    text's negative log-likelihood and number of tokens the exponent of a perplexity, resampled by text.

    Args:
        numerators, denominators: one of each a thing that is resampled; every denominator above 0.
        seed: of the resampling; the same seed gives the same interval.
        samples: how many resampled ratios; default: ``resamples``.

    Raises:
        ValueError: there is nothing, or a value is not finite, or a denominator is not above 0.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if not above.size or above.shape != below.shape or not np.isfinite(above).all() or not (below > 0).all():
        raise ValueError("the bootstrap needs finite numerators, denominators above 0, and at least one of each")
    generator = np.random.default_rng(seed)
    samples = samples or resamples(above.size)
    rows = max(1, CHUNK // above.size)
    ratios = []
    for start in range(0, samples, rows):
        drawn = generator.integers(0, above.size, size=(min(rows, samples - start), above.size))
        ratios.append(above[drawn].sum(axis=1) / below[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return {"mean": float(above.sum() / below.sum()), "low": float(low), "high": float(high)}


def mean_interval(values: Sequence[float], seed: int) -> dict[str, float] | None:
    """The mean with its 95 % bootstrap interval; None without a value."""
    return ratio_bootstrap(values, [1.0] * len(values), seed) if values else None


def distinct_n(texts_tokens: Sequence[Sequence[str]], n: int) -> float:
    """Return the share of different n-grams among all n-grams of all texts (Li et al. 2016); 0 where there is none."""
    grams = [gram for tokens in texts_tokens for gram in ngrams(tokens, n)]
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
