"""A task at a scale: the configuration that all its arms share, and what beside it they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError, nearest
from rrhf.recipes.config import SECTIONS, merge, override, read_config
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

    def noted(self, arm: Arm, seed: int, rate: float | None) -> dict[str, Any]:
        """All that an arm is made of: the run's configuration, and PPO's settings where it is PPO."""
        values = self.configuration(arm, seed, rate)
        if rate is None or arm.kind not in (PPO, NLPO):
            return values
        return {**values, "ppo": self.ppo_settings(arm, seed, rate)}

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
        UserError: a section is none, a key of that section is unknown, or a value does not fit.
    """
    others = [key for key in (SECTION, *SECTIONS) if not isinstance(config.get(key) or {}, Mapping)]
    if others:
        raise UserError("\n".join(f"section {key}: must hold keys and values, not {config[key]!r}" for key in others))
    own = {key: value for key, value in (config.get(SECTION) or {}).items() if value is not None}  # null: the default
    faults = [f"{SECTION}.{key}: unknown key: {nearest(key, VALUES)}" for key in own if key not in VALUES]
    if "learning_rates" not in own:
        faults.append(f"{SECTION}.learning_rates: is missing: {VALUES['learning_rates'][1]}")
    faults += [f"{SECTION}.{key} {own[key]}: {wanted}" for key, (fits, wanted) in VALUES.items()
               if key in own and not fits(own[key])]  # fmt: skip
    steps = (config.get("train") or {}).get("max_steps")
    if not _is_count(steps):
        faults.append(f"train.max_steps {steps}: the optimiser steps of every arm: {COUNT[1]}")
    if faults:
        raise UserError("\n".join(faults))
    return Scale(task, name, {key: value for key, value in config.items() if key != SECTION}, asked=asked, **own)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(fits, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


COUNT = (_is_count, "a whole number, which must be at least 1")

# The keys of the section, each with whether a value fits, and what does.
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rates": (
        lambda value: _is_list(value, lambda rate: _is_number(rate) and rate > 0),
        "a list of numbers above 0, as [1e-4, 3e-4]",
    ),
    **dict.fromkeys(("rate_queries", "rate_seeds", "held_out_samples", "resample_steps"), COUNT),
    "kl_beta": (lambda value: _is_number(value) and value >= 0, "a number, not negative"),
    "ppo": (lambda value: isinstance(value, Mapping), "keys with values, as {ppo_epochs: 2}"),
    "chosen": (_is_text, "the tag of a response, as human/chosen"),
    "arms": (lambda value: _is_list(value, _is_text), "a list of names, as [SFT, RRHF-DP]"),
    "set_aside": (lambda value: isinstance(value, bool), "true or false"),
}


def shipped_scales() -> dict[tuple[str, str], Path]:
    """(task, scale) → its YAML file."""
    folder = Path(str(resources.files("rrhf"))) / "recipes" / "reproduce"
    named = {path.stem.partition("-"): path for path in sorted(folder.glob("*.yaml"))}
    return {(task, scale): path for (task, _, scale), path in named.items()}
