"""Differences over seeds and prompts together: intervals, what a size can resolve, and many tests at once.

Values are matrices [seeds, prompts]: all seeds share the prompts, so both are drawn anew, each on its own (the crossed
bootstrap of Owen 2007). NaN stands where a text has no score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rrhf.common.presentation import NONE

SAMPLES = 10_000
CHUNK = 1_000  # resamples at a time
NORMAL_95, NORMAL_80 = 1.960, 0.842  # quantiles of 97.5 and 80 %


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over seeds and prompts.

    Attributes:
        mean, low, high: of the value.
        p: two-sided, of no difference: twice the smaller share of resampled means on one side of 0, at least 1/10,001.
        seeds, prompts: how many there were.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    prompts: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def shown(estimate: Estimate | None) -> str:
    return NONE if estimate is None else str(estimate)


def bootstrap(values: np.ndarray, seed: int = 0, samples: int = SAMPLES) -> Estimate:
    """The mean of ``values`` [seeds, prompts]; seeds and prompts are resampled, each with replacement.

    With one seed its draw is no draw, and the interval is over prompts alone.

    Raises:
        ValueError: there is no value.
    """
    known = np.isfinite(values)
    if values.ndim != 2 or not known.any():
        raise ValueError("an estimate needs values [seeds, prompts]")
    filled = np.where(known, values, 0.0)
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, samples, CHUNK):
        count = min(CHUNK, samples - start)
        rows, columns = (generator.multinomial(n, np.full(n, 1 / n), size=count).astype(float) for n in values.shape)
        total = ((rows @ filled) * columns).sum(axis=1)
        number = ((rows @ known) * columns).sum(axis=1)
        means.append(total[number > 0] / number[number > 0])
    drawn = np.concatenate(means)
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = min(1.0, 2 * (1 + min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))) / (1 + len(drawn)))
    return Estimate(float(filled.sum() / known.sum()), float(low), float(high), p, *values.shape)


@dataclass(frozen=True)
class Components:
    """Variances of a value [seeds, prompts] by seed, by prompt and the rest (two-way random effects, no repetition)."""

    seed: float
    prompt: float
    rest: float

    def standard_error(self, seeds: int, prompts: int) -> float:
        """Of the mean over so many seeds and prompts."""
        return math.sqrt(self.seed / seeds + self.prompt / prompts + self.rest / (seeds * prompts))

    def resolvable(self, seeds: int, prompts: int) -> float:
        """The difference that a two-sided test at 5 % finds in 80 of 100 studies of that size."""
        return (NORMAL_95 + NORMAL_80) * self.standard_error(seeds, prompts)


def components(values: np.ndarray) -> Components:
    """Variance components by the mean squares; negative estimates are 0.

    Raises:
        ValueError: fewer than two seeds or two prompts, or a value is missing.
    """
    seeds, prompts = values.shape
    if min(seeds, prompts) < 2 or not np.isfinite(values).all():
        raise ValueError("variance components need two seeds and two prompts, and every value")
    of_seed, of_prompt = values.mean(axis=1), values.mean(axis=0)
    rest = values - of_seed[:, None] - of_prompt[None, :] + values.mean()
    error = float((rest**2).sum() / ((seeds - 1) * (prompts - 1)))
    seed = float(prompts * of_seed.var(ddof=1) - error) / prompts
    prompt = float(seeds * of_prompt.var(ddof=1) - error) / seeds
    return Components(max(seed, 0.0), max(prompt, 0.0), error)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: the family-wise error is at most α where each is below α."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
