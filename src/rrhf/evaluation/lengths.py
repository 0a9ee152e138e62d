"""Reward beside length: whether a gain is more than longer, or shorter, answers. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rrhf.evaluation.metrics import mean_interval, resamples

BINS = 5


def gain_at_equal_length(
    differences: Sequence[float], length_differences: Sequence[float], seed: int
) -> dict[str, float]:
    """The mean paired gain that a linear model predicts where both texts are equally long.

    d = θ + φ · tanh(Δ / s), by least squares; Δ is the difference in length, s its standard deviation over the prompts;
    the gain is θ. It is the model of the length-controlled win rate (``evaluation.pairwise``, after arXiv 2404.04475)
    for rewards instead of wins. As there, a prior keeps φ finite: a ridge penalty of the weight of one prompt. Without
    it a few prompts whose Δ are much alike would give any θ. Where all Δ are equal, nothing can be told apart, and θ
    is the mean of d.

    Args:
        differences: d_n = R(x_n, π(x_n)) − R(x_n, ρ(x_n)), one a prompt.
        length_differences: Δ_n, in any unit.
        seed: of the bootstrap over prompts.

    Returns:
        ``mean`` (θ), ``low`` and ``high`` (95 %), ``slope`` (φ).

    Raises:
        ValueError: there is no difference, or not one length difference each.
    """
    gained, longer = np.asarray(differences, dtype=np.float64), np.asarray(length_differences, dtype=np.float64)
    if not gained.size or gained.shape != longer.shape:
        raise ValueError("the length model needs a length difference a gain, and at least one")
    spread = longer.std()
    x = np.tanh(longer / spread) if spread > 0 else np.zeros_like(longer)
    generator = np.random.default_rng(seed)
    samples = resamples(gained.size)
    rows = max(1, 1_000_000 // gained.size)
    drawn = (
        generator.integers(0, gained.size, size=(min(rows, samples - start), gained.size))
        for start in range(0, samples, rows)
    )
    found = np.concatenate([_intercepts(gained[index], x[index])[0] for index in drawn])
    (mean,), (slope,) = _intercepts(gained[None], x[None])
    low, high = np.quantile(found, [0.025, 0.975])
    return {"mean": float(mean), "low": float(low), "high": float(high), "slope": float(slope)}


def _intercepts(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """θ and φ of each row of y = θ + φ x + ε with Σ ε² + φ² least. Arrays of shape (rows, n) → two of shape (rows,)."""
    mean_x, mean_y = x.mean(axis=1), y.mean(axis=1)
    variance = (x * x).mean(axis=1) - mean_x**2
    covariance = (x * y).mean(axis=1) - mean_x * mean_y
    slope = covariance / (variance + 1 / x.shape[1])
    return mean_y - slope * mean_x, slope


def rewards_by_length(
    lengths: dict[str, Sequence[float]], rewards: dict[str, Sequence[float]], seed: int, bins: int = BINS
) -> list[dict[str, Any]]:
    """Each model's mean reward among texts of about the same length.

    Args:
        lengths: model → the lengths of its texts.
        rewards: model → their rewards, in the same order.
        seed: of the bootstraps over texts.
        bins: at most how many; their limits are quantiles of all models' lengths together.

    Returns:
        A line a bin, from short to long: ``low`` and ``high`` (its shortest and longest text), and, by model, ``n`` and
        the mean ``reward`` with its interval (None without a text).
    """
    every = np.concatenate([np.asarray(values, dtype=np.float64) for values in lengths.values()])
    if not every.size:
        return []
    edges = np.unique(np.quantile(every, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    lines = []
    for number in range(len(edges) + 1):
        inside = {name: np.searchsorted(edges, values, side="left") == number for name, values in lengths.items()}
        there = np.concatenate([np.asarray(lengths[name], dtype=np.float64)[kept] for name, kept in inside.items()])
        if not there.size:
            continue
        models = {}
        for name, kept in inside.items():
            values = np.asarray(rewards[name], dtype=np.float64)[kept].tolist()
            models[name] = {"n": len(values), "reward": mean_interval(values, seed)}
        lines.append({"low": float(there.min()), "high": float(there.max()), "models": models})
    return lines
