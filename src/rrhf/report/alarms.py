"""What a run warns of: collapse in training or at evaluation, rewards that part, phrases, samples without a signal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.presentation import finite, percent, short_name
from rrhf.evaluation.held_out import length_correlation
from rrhf.records.inspection.measures import NO_SIGNAL_SHARE
from rrhf.report.load import setting
from rrhf.report.run import Run
from rrhf.report.tables import interval_side, phrases
from rrhf.training.alarms import Measurement, alarms, measurements
from rrhf.training.watch_settings import WatchSettings

PHRASE_RISE = 0.25  # how many more of π's answers than of ρ's have a phrase: a reward that is hacked shows there


@dataclass(frozen=True)
class Alarm:
    """``rule`` fired ``where`` ("step 40", "evaluation", "samples"), and the sentence with figures and what to do."""

    where: str
    rule: str
    text: str


def run_alarms(run: Run) -> list[Alarm]:
    """A run's alarms: in training (``training.alarms``, each when it begins to fire), at its end, of its samples."""
    limits = _limits(run.settings)
    return [
        *_in_training(run, limits),
        *_at_evaluation(run, limits),
        *_rewards_part(run),
        *_phrase(run),
        *_of_samples(run),
    ]


def watched(run: Run) -> int:
    """How often the policy was measured in training."""
    return len(measurements(run.history))


def _limits(settings: Mapping[str, str]) -> WatchSettings:
    """The limits that the run's settings name, else the defaults."""
    given: dict[str, Any] = {}
    for field in fields(WatchSettings):
        value = setting(settings, field.name) if field.name.startswith("alarm_") else None
        if value is not None:
            try:
                given[field.name] = float(json.loads(value))
            except (ValueError, TypeError):
                continue
    try:
        return WatchSettings(**given)
    except UserError:
        return WatchSettings()


def _in_training(run: Run, limits: WatchSettings) -> list[Alarm]:
    found, firing = [], set[str]()
    # A log of an older version may lack a number: then the rule that needs it is silent.
    measured = [
        replace(m, prompts=m.prompts or 0) for m in measurements(run.history) if finite(m.length_mean) is not None
    ]
    for now in measured[1:]:
        fired = alarms(measured[0], now, limits)
        found += [Alarm(f"step {now.step}", rule, text) for rule, text in fired.items() if rule not in firing]
        firing = set(fired)
    return found


def _at_evaluation(run: Run, limits: WatchSettings) -> list[Alarm]:
    """The same rules on the held-out prompts of the evaluation; ρ is the start."""
    start, now = (_measurement(run, model, step) for step, model in enumerate(("rho", "pi")))
    if start is None or now is None:
        return []
    # ρ is a model, not a step.
    return [
        Alarm("evaluation", rule, text.replace("at step 0", "for ρ"))
        for rule, text in alarms(start, now, limits).items()
    ]


def _measurement(run: Run, model: str, step: int) -> Measurement | None:
    numbers, reward = run.evaluation.get(model) or {}, run.main_reward
    length, distinct = finite(numbers.get("length_mean")), finite(numbers.get("distinct_2"))
    if length is None or distinct is None:
        return None
    values = run.held.rewards.get(reward or "", {}).get(model, [])
    return Measurement(
        step=step,
        reward_mean=finite(numbers.get("reward_mean")),
        perplexity=finite(numbers.get("perplexity")),
        length_mean=length,
        distinct_2=distinct,
        score_length_correlation=length_correlation(run.held.lengths[model], values) if values else None,
        prompts=sum(value is not None for value in values),
    )


def _rewards_part(run: Run) -> list[Alarm]:
    """The main reward rose surely while another one, which did not train, surely fell."""
    sides = {}
    for reward, numbers in run.rewards.items():
        low, high = (finite((numbers.get("gain") or {}).get(end)) for end in ("low", "high"))
        sides[reward] = None if low is None or high is None else interval_side(low, high)
    if not run.main_reward or sides[run.main_reward] != 1:
        return []
    fallen = [short_name(reward) for reward, side in sides.items() if side == -1]
    if not fallen:
        return []
    return [
        Alarm(
            "evaluation",
            "rewards part",
            f"π earns more by {short_name(run.main_reward)} and less by {', '.join(fallen)}: what training pays for is "
            "not what the other measures. Read the largest losses below; take an earlier checkpoint or another reward",
        )
    ]


def _phrase(run: Run) -> list[Alarm]:
    """One phrase has come into many of π's answers, which a reward's mean does not show."""
    return [
        Alarm(
            "evaluation",
            "phrase",
            f"“{phrase}” stands in {percent(pi, 0)} of π's answers and in {percent(rho, 0)} of ρ's: the reward may pay "
            "for the expression, whatever was asked. Read the samples below; train for fewer steps or with a "
            "KL penalty (--kl_beta), or take another reward",
        )
        for phrase, rho, pi in phrases(run.evaluation)[:1]  # the one that rose most
        if pi - rho >= PHRASE_RISE
    ]


def _of_samples(run: Run) -> list[Alarm]:
    samples = run.samples
    if samples is None or samples.no_pairs <= NO_SIGNAL_SHARE * samples.queries:
        return []
    return [
        Alarm(
            "samples",
            "no signal",
            f"{samples.no_pairs} of {samples.queries} queries ({percent(samples.no_pairs / samples.queries, 0)}) have "
            "fewer than two different scores: only their best response is fitted. Sample more, or more varied, "
            "responses, or take a reward that tells them apart",
        )
    ]
