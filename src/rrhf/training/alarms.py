"""Alarms for a policy that collapses in training: pure functions of two measurements and the limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from rrhf.training.watch_settings import WatchSettings


@dataclass(frozen=True)
class Measurement:
    """What the answers of one step came to.

    ``reward_mean`` is of the first reward, ``perplexity`` under the frozen model, ``length_mean`` in tokens of the
    policy (the end token counted), ``distinct_2`` the share of different pairs of neighbouring words,
    ``score_length_correlation`` Pearson's r over the ``prompts`` that have a score. None where there is none.
    """

    step: int
    reward_mean: float | None
    perplexity: float | None
    length_mean: float
    distinct_2: float
    score_length_correlation: float | None
    prompts: int

    def logs(self) -> dict[str, float]:
        """As the trainer logs it."""
        values = {f"eval_{f.name}": getattr(self, f.name) for f in fields(self) if f.name != "step"}
        return {name: value for name, value in values.items() if value is not None}


def measurements(log_history: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """The measurements that a trainer's ``log_history`` holds, in order."""
    names = [f.name for f in fields(Measurement) if f.name != "step"]

    def values(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: row.get(f"eval_{name}") for name in names}

    return [Measurement(step=int(row["step"]), **values(row)) for row in log_history if "eval_distinct_2" in row]


def pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's r; None where one side does not vary or there are fewer than three pairs."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1.0, 1.0))


def _variety(start: Measurement, now: Measurement, limits: WatchSettings) -> str | None:
    # Downwards only: more variety than at the start is no collapse, and a salad of words shows in the perplexity.
    if now.distinct_2 >= limits.alarm_distinct * start.distinct_2:
        return None
    return (
        f"distinct-2 is {now.distinct_2:.3f}, was {start.distinct_2:.3f} at step {start.step} (the limit is "
        f"{limits.alarm_distinct:g} of that): the policy repeats itself. Lower --learning_rate or raise --sft_weight"
    )


def _length(start: Measurement, now: Measurement, limits: WatchSettings) -> str | None:
    factor, before = limits.alarm_length, max(start.length_mean, 1.0)
    if before / factor <= now.length_mean <= before * factor:
        return None
    return (
        f"answers have {now.length_mean:.1f} tokens on average, had {start.length_mean:.1f} at step {start.step} (the "
        f"limit is a factor of {factor:g}). See whether the best-scored training responses are that "
        f"{'long' if now.length_mean > before else 'short'}; if not, lower --learning_rate"
    )


def _over_optimised(start: Measurement, now: Measurement, limits: WatchSettings) -> str | None:
    if start.perplexity is None or now.perplexity is None or start.reward_mean is None or now.reward_mean is None:
        return None
    if now.reward_mean <= start.reward_mean or now.perplexity < limits.alarm_perplexity * start.perplexity:
        return None
    return (
        f"the reward is up ({start.reward_mean:.4g} to {now.reward_mean:.4g}) while perplexity went from "
        f"{start.perplexity:.2f} to {now.perplexity:.2f} (the limit is a factor of {limits.alarm_perplexity:g}): the "
        "reward is being exploited. Take an earlier checkpoint, lower --learning_rate, or train fewer epochs"
    )


LEAST_PROMPTS = 10  # fewer say nothing of a correlation


SIGNIFICANT = 2.576  # standard errors from zero, 1 % on two sides


RISEN = 1.645  # standard errors above the start, 5 % on one side


def _length_paid(start: Measurement, now: Measurement, limits: WatchSettings) -> str | None:
    """|r| at the limit, differing from 0 and, in its own direction, above the start, both by Fisher's z = artanh r.

    z of n pairs has the standard error 1/√(n − 3), a difference of two √(1/(n_1 − 3) + 1/(n_0 − 3)). A start without
    a correlation (all answers equally long) counts as 0.
    """
    r, before = now.score_length_correlation, start.score_length_correlation or 0.0
    if r is None or min(now.prompts, start.prompts) < LEAST_PROMPTS or abs(r) < limits.alarm_correlation:
        return None
    z, z_before = (math.atanh(max(-0.999999, min(0.999999, value))) for value in (r, before))
    variance = 1 / (now.prompts - 3)
    risen = (z - z_before) * math.copysign(1.0, r)
    if abs(z) < SIGNIFICANT * math.sqrt(variance) or risen < RISEN * math.sqrt(variance + 1 / (start.prompts - 3)):
        return None
    return (
        f"reward and length of the answers correlate with r = {r:.2f} over {now.prompts} prompts, with {before:.2f} at "
        f"step {start.step} (the limit is {limits.alarm_correlation:g}): the policy wins by "
        f"{'longer' if r > 0 else 'shorter'} answers. Check what the reward pays for"
    )


RULES: dict[str, Callable[[Measurement, Measurement, WatchSettings], str | None]] = {
    "variety": _variety,
    "length": _length,
    "perplexity": _over_optimised,
    "correlation": _length_paid,
}


def alarms(start: Measurement, now: Measurement, limits: WatchSettings) -> dict[str, str]:
    """The rules that fire, each with its sentence: figures and what to do."""
    texts = {name: rule(start, now, limits) for name, rule in RULES.items()}
    return {name: text for name, text in texts.items() if text is not None}
