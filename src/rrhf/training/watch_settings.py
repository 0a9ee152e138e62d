"""``WatchSettings``: how a policy is watched while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rrhf.common.errors import UserError, nearest, too_small
from rrhf.rewards.scoring import is_provided
from rrhf.sampling.settings import SamplingSettings

ALARMS = ("warn", "stop", "off")


@dataclass(frozen=True)
class WatchSettings:
    """How a policy is watched while it trains, and what counts as collapse."""

    watch_steps: int = field(
        default=0,
        metadata={"help": "answer the watched prompts every so many optimiser steps, and before and after; 0: never"},
    )
    watch_data: str | None = field(
        default=None, metadata={"help": "records whose queries are watched; in a run, default: the held-out prompts"}
    )
    watch_prompts: int = field(default=32, metadata={"help": "how many of them, from the front"})
    watch_reward: list[str] = field(
        default_factory=list,
        metadata={"help": "pkg.module:function …, the first counts; in a run, default: those of the evaluation",
                  "nargs": "+"},
    )  # fmt: skip
    watch_policy: str = field(default="greedy", metadata={"help": "sampling policy of the answers, one a prompt"})
    watch_max_new_tokens: int = field(
        default=64, metadata={"help": "most tokens of an answer; twice the usual length lets growing ones be seen"}
    )
    watch_perplexity_model: str | None = field(
        default=None,
        metadata={"help": "under which perplexity is taken: a model, or none; default: the starting weights; with "
                  "--peft they are the trained model without its adapter, else a second copy in memory (weights only)"},
    )  # fmt: skip
    alarm: str = field(
        default="warn", metadata={"help": "what a collapse does: warn, stop (with a checkpoint), or off"}
    )
    alarm_distinct: float = field(
        default=0.5, metadata={"help": "alarm when distinct-2 falls below this share of what it was at the start"}
    )
    alarm_length: float = field(
        default=2.0, metadata={"help": "alarm when the mean length is this factor longer or shorter than at the start"}
    )
    alarm_perplexity: float = field(
        default=2.0, metadata={"help": "alarm when perplexity is this many times its start while the reward is up"}
    )
    alarm_correlation: float = field(
        default=0.6, metadata={"help": "alarm when reward and length correlate this much, and more than at the start"}
    )

    def __post_init__(self) -> None:
        faults = []
        if self.alarm not in ALARMS:
            faults.append(f"--alarm {self.alarm}: {nearest(self.alarm, ALARMS)}")
        if self.alarm == "stop" and self.watch_steps == 0:
            faults.append("--alarm stop: nothing is watched; give --watch_steps")
        faults += too_small(self, watch_steps=0, watch_prompts=1)
        for name, low, high in (
            ("alarm_distinct", 0.0, 1.0), ("alarm_correlation", 0.0, 1.0),
            ("alarm_length", 1.0, math.inf), ("alarm_perplexity", 1.0, math.inf),
        ):  # fmt: skip
            if not low < getattr(self, name) < high:
                faults.append(f"--{name} {getattr(self, name)}: must lie between {low:g} and {high:g}")
        try:
            _ = self.sampling(0)
        except UserError as error:
            faults += [f"--watch_{line.removeprefix('--')}" for line in str(error).splitlines()]
        if faults:
            raise UserError("\n".join(faults))

    def sampling(self, seed: int) -> SamplingSettings:
        """How the answers are drawn: with the same seed each time, so that only the policy changes."""
        return SamplingSettings(
            policy=self.watch_policy, num_responses=1, max_new_tokens=self.watch_max_new_tokens, seed=seed
        )

    def filled(self, data: Path, rewards: Sequence[str]) -> WatchSettings:
        """With these prompts and rewards where none are named; rewards that need provided scores are left out."""
        usable = [reward for reward in rewards if not is_provided(reward)]
        return replace(self, watch_data=self.watch_data or str(data), watch_reward=self.watch_reward or usable)
