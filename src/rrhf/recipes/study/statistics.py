"""Differences over seeds and prompts together: intervals, what a size can resolve, and many tests at once.

Values are matrices [seeds, prompts]: all seeds share the prompts, so both are drawn anew, each on its own (the crossed
bootstrap of Owen 2007). Of three or five seeds a bootstrap alone sees too little: its intervals are given the width,
and p-values the tails, of Student's t with the standard error that Hillis (2007) derives for studies of few readers who
all judge the same cases (seeds are the readers here, prompts the cases), and with the degrees of freedom of the seeds.
Hillis's own are more, and too many for a small α: where seeds lie near each other by chance, they say that prompts
alone matter. NaN stands where a text has no score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rrhf.common.imports import of_extra
from rrhf.common.presentation import NONE

MISSING = "the study's intervals need scipy: pip install 'rrhf[demo]'"

SAMPLES = 10_000
CHUNK = 1_000  # resamples at a time
ALPHA, POWER = 0.05, 0.8
ROUNDING = 1e-12  # of the largest value: an error below it is what sums of equal values leave


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over seeds and prompts.

    Attributes:
        mean, low, high: of the value.
        p: two-sided, of no difference, by Student's t.
        seeds, prompts: how many there were.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    prompts: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + ("" if math.isnan(self.low) else f" [{self.low:+.3f}, {self.high:+.3f}]")


def shown(estimate: Estimate | None) -> str:
    return NONE if estimate is None else str(estimate)


def bootstrap(values: np.ndarray, seed: int = 0, samples: int = SAMPLES) -> Estimate:
    """The mean of ``values`` [seeds, prompts]; seeds and prompts are resampled, each with replacement.

    The quantiles of the resampled means are moved out from the mean, or in, so that they stand as far apart as those of
    Student's t with ``standard_error`` do. Of one number a seed (one column) the interval is t's own: a few numbers
    drawn again say nothing of its shape. With one seed it is over prompts alone; of one value there is none (NaN), and
    p is 1.

    Raises:
        ValueError: there is no value.
        UserError: scipy is not installed.
    """
    known = np.isfinite(values)
    if values.ndim != 2 or not known.any():
        raise ValueError("an estimate needs values [seeds, prompts]")
    mean, (error, freedom) = float(values[known].mean()), standard_error(values)
    if error < ROUNDING * float(np.abs(values[known]).max()):
        error = 0.0
    student = of_extra("scipy.stats", MISSING).t(freedom)
    half = float(student.ppf(1 - ALPHA / 2)) * error
    low, high = (mean - half, mean + half) if known.sum() > 1 else (math.nan, math.nan)
    if values.shape[1] > 1 and half:
        ends = _resampled(values, seed, samples)
        low, high = (mean + (float(end) - mean) * 2 * half / float(ends[1] - ends[0]) for end in ends)
    p = 2 * float(student.sf(abs(mean) / error)) if error else float(mean == 0 or known.sum() == 1)
    return Estimate(mean, low, high, p, *values.shape)


def _resampled(values: np.ndarray, seed: int, samples: int) -> np.ndarray:
    """The ends of the middle 95 % of the means of resampled values."""
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, samples, CHUNK):
        count = min(CHUNK, samples - start)
        rows, columns = (generator.multinomial(n, np.full(n, 1 / n), size=count).astype(float) for n in values.shape)
        total = ((rows @ filled) * columns).sum(axis=1)
        number = ((rows @ known) * columns).sum(axis=1)
        means.append(total[number > 0] / number[number > 0])
    return np.asarray(np.quantile(np.concatenate(means), [ALPHA / 2, 1 - ALPHA / 2]))


def standard_error(values: np.ndarray) -> tuple[float, int]:
    """Of the mean of ``values`` [seeds, prompts] (Hillis 2007, eq. 4), and its degrees of freedom, seeds − 1.

    With mean squares M of seeds, prompts and the rest: √((M_seed + max(M_prompt − M_rest, 0)) / (seeds · prompts)). One
    row or one column is a plain sample. Missing values are put where their seed and prompt would have them. In
    simulated studies of 3, 5 and 10 seeds no more tests than are meant find what is not there, at 5 % and as the first
    of 44 in Holm's method; with Hillis's degrees of freedom up to 14, 4 and 1.6 times as many do as the first of 44.
    """
    filled = _complete(values)
    if min(filled.shape) < 2:
        count = filled.size
        return (float(filled.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0), max(count - 1, 1)
    seeds, prompts = filled.shape
    of_seed, of_prompt, rest = _mean_squares(filled)
    return math.sqrt((of_seed + max(of_prompt - rest, 0.0)) / (seeds * prompts)), seeds - 1


def _complete(values: np.ndarray) -> np.ndarray:
    """Without rows and columns of nothing but NaN; other NaN are what an additive model has there."""
    known = np.isfinite(values)
    values, known = values[known.any(axis=1)][:, known.any(axis=0)], known[known.any(axis=1)][:, known.any(axis=0)]
    of_seed = np.nanmean(values, axis=1, keepdims=True)
    of_prompt = np.nanmean(values - of_seed, axis=0, keepdims=True)
    return np.where(known, values, of_seed + of_prompt)


def _mean_squares(values: np.ndarray) -> tuple[float, float, float]:
    """Of seeds, prompts and the rest, in an analysis of variance of [seeds, prompts] without repetition."""
    seeds, prompts = values.shape
    of_seed, of_prompt = values.mean(axis=1), values.mean(axis=0)
    rest = values - of_seed[:, None] - of_prompt[None, :] + values.mean()
    error = float((rest**2).sum() / ((seeds - 1) * (prompts - 1)))
    return float(prompts * of_seed.var(ddof=1)), float(seeds * of_prompt.var(ddof=1)), error


@dataclass(frozen=True)
class Components:
    """Variances of a value [seeds, prompts] by seed, by prompt and the rest (two-way random effects, no repetition)."""

    seed: float
    prompt: float
    rest: float

    def standard_error(self, seeds: int, prompts: int) -> float:
        """Of the mean over so many seeds and prompts, as the function of that name."""
        return math.sqrt(self.seed / seeds + self.prompt / prompts + self.rest / (seeds * prompts))

    def resolvable(self, seeds: int, prompts: int, tests: int = 1) -> float:
        """The difference that 80 of 100 studies of that size find by a two-sided test at 5 %, by Student's t.

        As the first of so many ``tests`` in Holm's method, which asks the most of it.

        Raises:
            UserError: scipy is not installed.
        """
        error, freedom = self.standard_error(seeds, prompts), seeds - 1
        stats, optimize = (of_extra(f"scipy.{name}", MISSING) for name in ("stats", "optimize"))
        critical = float(stats.t(freedom).ppf(1 - ALPHA / 2 / tests))

        def beyond(shift: float) -> float:
            return float(stats.nct.sf(critical, freedom, shift)) - POWER

        return float(optimize.brentq(beyond, 0.0, 10 * critical)) * error


def components(values: np.ndarray) -> Components:
    """Variance components by the mean squares; negative estimates are 0.

    Raises:
        ValueError: fewer than two seeds or two prompts, or a value is missing.
    """
    seeds, prompts = values.shape
    if min(seeds, prompts) < 2 or not np.isfinite(values).all():
        raise ValueError("variance components need two seeds and two prompts, and every value")
    of_seed, of_prompt, error = _mean_squares(values)
    seed, prompt = (of_seed - error) / prompts, (of_prompt - error) / seeds
    return Components(max(seed, 0.0), max(prompt, 0.0), error)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: the family-wise error is at most α where each is below α."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
