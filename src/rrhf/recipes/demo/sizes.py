"""How large a demo this machine can finish while a person waits.

The machine is measured for a few seconds with what the demo itself does, on its own model: both passes of a training
step, the optimiser, decoding. From that each size's minutes are estimated, and the largest that a person would wait for
is taken.
"""

from __future__ import annotations

from typing import Any

from rrhf.models.load import ModelSettings
from rrhf.recipes.config import read_config
from rrhf.recipes.speed import EVALUATED_SHARE, Shape, Speed, measure_machine
from rrhf.sampling.settings import SamplingSettings

# Smallest first: each is a shipped configuration. The first is too small for its figures to mean anything.
SIZES = {"quick": "demo-quick", "small": "demo-small", "full": "demo"}
PATIENCE = 10.0  # minutes that a person waits
# Seconds for what does not depend on the size: reading reviews, fitting two classifiers, loading the model three times.
FIXED_SECONDS = 60.0
SHAPE = Shape(query=32, response=40, responses=5)  # a training record of the demo


def minutes(config: dict[str, Any], speed: Speed) -> float:
    """What a demo of this configuration takes on a machine of this speed, in minutes, the installation not counted."""
    queries, held_out, train = config["data"]["limit"], config["data"]["held_out_limit"], config["train"]
    steps = train["num_train_epochs"] * -(-queries // train["per_device_train_batch_size"])
    evaluated = 2 * held_out
    if train.get("watch_steps"):
        looks = 2 + (steps - 1) // train["watch_steps"]
        evaluated += looks * 32 * train["watch_max_new_tokens"] / SHAPE.response
    seconds = FIXED_SECONDS + queries * speed.sampled + evaluated * EVALUATED_SHARE * speed.sampled
    seconds += train["num_train_epochs"] * queries * speed.trained + steps * speed.optimised
    return float(seconds / 60)


def choose_size(estimates: dict[str, float]) -> str:
    """The largest size but "quick" that ends within ``PATIENCE``; "small" where none does."""
    within = [name for name, took in estimates.items() if name != "quick" and took <= PATIENCE]
    return within[-1] if within else "small"


def estimate_sizes() -> dict[str, float]:
    """Measure the machine; minutes of every size, the smallest first."""
    configs = {name: read_config(config) for name, config in SIZES.items()}
    sampling = SamplingSettings(policy="top-k", num_responses=4, temperature=0.8)
    speed = measure_machine(ModelSettings(model=configs["full"]["model"]), SHAPE, sampling)
    return {name: minutes(config, speed) for name, config in configs.items()}
