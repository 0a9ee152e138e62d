"""A task at a scale: the configuration that all its arms share, and what beside it they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError, nearest
from rrhf.recipes.config import merge, override, read_config
from rrhf.recipes.reproduce.arms import ARMS, NLPO, PPO, RUN, TASKS, Arm

SET_ASIDE = 1_000  # the first seed of confirmations
REWARDS = ("proxy", "gold")  # the first that an evaluation has trains, the second only judges
SECTION = "reproduce"  # of a scale's YAML; the rest is a run's configuration


@dataclass(frozen=True)
class Scale:
    """What the arms of a task share at a scale.

    Attributes:
        task: one of ``TASKS``.
        name: micro, small, full, or a YAML file.
        config: a run's configuration, over which an arm's is laid; ``train.max_steps`` are the steps of every arm.
        learning_rates: the grid.
        rate_queries: prompts on which a rate is chosen.
        rate_seeds: seeds that run every rate, and by whose mean one is chosen.
        held_out_samples: responses that are judged to each held-out prompt. It stands in the file of prompts as often,
            each time under an id of its own; intervals are over prompts, each with the mean of its responses.
        resample_steps: k of OP-k, where an arm has none of its own.
        kl_beta: β of the arms with KL.
        ppo: settings of PPO and NLPO beside those that ``config`` has.
        chosen: the tag of the data's response that SFT is trained on.
        arms: what is run where ``--arms`` is not given; default: all of the task.
        set_aside: seeds from ``SET_ASIDE`` on and held-out prompts that no other run has seen: to confirm what a search
            has found.
        asked: what was laid over the scale's YAML, as ``section.key=value``.
    """

    task: str
    name: str
    config: Mapping[str, Any]
    learning_rates: Sequence[float]
    rate_queries: int = 100
    rate_seeds: int = 1
    held_out_samples: int = 1
    resample_steps: int = 8
    kl_beta: float = 0.1
    ppo: Mapping[str, Any] = field(default_factory=dict)
    chosen: str = "human/chosen"
    arms: Sequence[str] = ()
    set_aside: bool = False
    asked: Sequence[str] = ()

    @property
    def steps(self) -> int:
        """Optimiser steps of every arm that trains."""
        return int(self.config["train"]["max_steps"])

    @property
    def first_seed(self) -> int:
        return SET_ASIDE if self.set_aside else 0

    @property
    def default_arms(self) -> list[str]:
        return list(self.arms) or [arm.name for arm in ARMS[self.task]]

    def configuration(self, arm: Arm, seed: int, rate: float | None) -> dict[str, Any]:
        """The run's configuration of an arm from a seed."""
        train: dict[str, Any] = {} if rate is None else {"learning_rate": rate}
        # The accuracy of p_i is measured on the same samples of ρ for all arms, not on each arm's own.
        over: dict[str, Any] = {"seed": seed, "train": train, "evaluate": {"ranked_samples": 0}}
        if arm.kind == RUN:
            if arm.rounds > 1:
                over["iterations"] = arm.rounds
                train["max_steps"] = max(1, self.steps // arm.rounds)
            if arm.online:
                train["resample_steps"] = arm.resample_steps or self.resample_steps
            if arm.kl:
                over["score"] = {"kl_beta": self.kl_beta, "reference_model": self.config.get("model")}
        return merge(merge(self.config, arm.config), over)

    def ppo_settings(self, arm: Arm, seed: int, rate: float) -> dict[str, Any]:
        """The settings of ``PPOConfig`` for an arm of that kind."""
        assert arm.kind in (PPO, NLPO)
        train, sample = self.config["train"], self.config["sample"]
        return {
            "max_steps": self.steps,
            "max_new_tokens": sample["max_new_tokens"],
            "per_device_train_batch_size": queries_a_step(train),
            "save_steps": int(train.get("save_steps", 100)),
            **self.ppo,
            "learning_rate": rate,
            "kl_beta": self.kl_beta if arm.kl else 0.0,
            "seed": seed,
        }


def queries_a_step(train: Mapping[str, Any]) -> int:
    """Queries of an optimiser step, on one device."""
    return int(train["per_device_train_batch_size"]) * int(train.get("gradient_accumulation_steps", 1))


def read_scale(task: str, name: str, assignments: Sequence[str] = ()) -> Scale:
    """The scale of a task, one that is shipped or a YAML file, with ``section.key=value`` laid over its configuration.

    Raises:
        UserError: there is none, or an assignment is not one.
    """
    if task not in TASKS:
        raise UserError(f"{task!r}: {nearest(task, TASKS)}")
    places = shipped_scales()
    if Path(name).suffix == ".yaml":
        place = name
    elif (task, name) in places:
        place = str(places[task, name])
    else:
        known = ", ".join(scale for of_task, scale in places if of_task == task)
        raise UserError(f"--scale {name}: {task} has {known}; or give a YAML file")
    return make_scale(task, name, override(read_config(place), assignments), tuple(assignments))


def make_scale(task: str, name: str, config: Mapping[str, Any], asked: Sequence[str] = ()) -> Scale:
    """A scale of a configuration whose section ``reproduce`` has what is the scale's own.

    Raises:
        UserError: a key of that section is unknown.
    """
    own = dict(config.get(SECTION) or {})
    known = {f.name for f in fields(Scale)} - {"task", "name", "config", "asked"}
    if unknown := [key for key in own if key not in known]:
        raise UserError("\n".join(f"{SECTION}.{key}: unknown key: {nearest(key, known)}" for key in unknown))
    for key in ("held_out_samples", "rate_seeds"):
        if own.get(key, 1) < 1:
            raise UserError(f"{SECTION}.{key} {own[key]}: must be at least 1")
    rates = own.get("learning_rates", [])
    if not isinstance(rates, list) or not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
        raise UserError(f"{SECTION}.learning_rates {rates}: a list of numbers above 0, as [1e-4, 3e-4]")
    return Scale(task, name, {key: value for key, value in config.items() if key != SECTION}, asked=asked, **own)


def shipped_scales() -> dict[tuple[str, str], Path]:
    """(task, scale) → its YAML file."""
    folder = Path(str(resources.files("rrhf"))) / "recipes" / "reproduce"
    named = {path.stem.partition("-"): path for path in sorted(folder.glob("*.yaml"))}
    return {(task, scale): path for (task, _, scale), path in named.items()}
