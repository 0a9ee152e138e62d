"""How large a demo this machine can finish while a person waits.

The machine is measured for a few seconds with what the demo itself does, on its own model: both passes of a training
step, the optimiser, decoding. From that each size's minutes are estimated, and the largest that a person would wait for
is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rrhf.models.load import ModelSettings, load_policy
from rrhf.models.passes import response_logprobs
from rrhf.models.path_check import usable_path
from rrhf.models.tokenization import EncodedRecord
from rrhf.recipes.config import read_config
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings

# Smallest first: each is a shipped configuration. The first is too small for its figures to mean anything.
SIZES = {"quick": "demo-quick", "small": "demo-small", "full": "demo"}
PATIENCE = 10.0  # minutes that a person waits
# Seconds for what does not depend on the size: reading reviews, fitting two classifiers, loading the model three times.
FIXED_SECONDS = 60.0
# An evaluated response costs about this share of a training query's four: its query is as long, and decoding one row a
# query or four takes nearly the same time; the rest is its perplexity and a second classifier.
EVALUATED_SHARE = 0.9

PROMPT_TOKENS, RESPONSE_TOKENS, RESPONSES = 32, 40, 5  # a training record of the demo
PROBED_QUERIES, PROBED_TOKENS = 16, 6  # what is decoded for the measurement
PROBED_RECORDS = 3  # in one pair of passes: a single record's products are too small to be as fast as a step's


@dataclass(frozen=True)
class Speed:
    """Seconds of this machine for each thing the demo does: a query sampled, a query trained on, an optimiser step."""

    sampled: float
    trained: float
    optimised: float


def measure_machine(model: ModelSettings) -> Speed:
    """Time the demo's work on its own model: passes of a few records, an optimiser step, some decoded tokens."""
    policy, tokenizer = load_policy(model, training=True)
    return Speed(_sampling_seconds(policy, tokenizer), *_training_seconds(policy))


def minutes(config: dict[str, Any], speed: Speed) -> float:
    """What a demo of this configuration takes on a machine of this speed, in minutes, the installation not counted."""
    queries, held_out, train = config["data"]["limit"], config["data"]["held_out_limit"], config["train"]
    steps = train["num_train_epochs"] * -(-queries // train["per_device_train_batch_size"])
    evaluated = 2 * held_out
    if train.get("watch_steps"):
        looks = 2 + (steps - 1) // train["watch_steps"]
        evaluated += looks * 32 * train["watch_max_new_tokens"] / RESPONSE_TOKENS
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
    speed = measure_machine(ModelSettings(model=configs["full"]["model"]))
    return {name: minutes(config, speed) for name, config in configs.items()}


def _seconds(work: Callable[[], object], device: Any) -> float:
    """Seconds of the second of two calls: the first one warms up."""
    import torch

    taken = 0.0
    for _ in range(2):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - began
    return taken


def _sampling_seconds(policy: Any, tokenizer: Any) -> float:
    """Seconds a query: its pass, and ``RESPONSE_TOKENS`` steps of four responses."""
    queries = [_tokens(PROMPT_TOKENS, number) for number in range(PROBED_QUERIES)]
    keys, ends = [str(number) for number in range(PROBED_QUERIES)], [set[int]() for _ in queries]

    def draw(tokens: int) -> float:
        settings = SamplingSettings(policy="top-k", num_responses=4, temperature=0.8, max_new_tokens=tokens)
        sampler = Sampler(policy, tokenizer, settings)
        return _seconds(lambda: sampler.draw(queries, keys, ends), policy.device)

    first, more = draw(1), draw(1 + PROBED_TOKENS)
    step = max(more - first, 0.0) / PROBED_TOKENS
    return (first + RESPONSE_TOKENS * step) / PROBED_QUERIES


def _training_seconds(policy: Any) -> tuple[float, float]:
    """Seconds a record for both passes over several, and for an optimiser step."""
    import torch

    from rrhf.training.master_weights import MasterWeights

    responses = [_tokens(RESPONSE_TOKENS, 1 + number) for number in range(RESPONSES)]
    records = [EncodedRecord("probe", _tokens(PROMPT_TOKENS, 0), responses, [None] * RESPONSES)] * PROBED_RECORDS
    path = usable_path(policy)

    def both_passes() -> None:
        policy.zero_grad()
        (-response_logprobs(policy, records, path, keep_logits=True).sums.mean()).backward()

    trained = _seconds(both_passes, policy.device) / PROBED_RECORDS
    optimiser = MasterWeights([{"params": list(policy.parameters())}], torch.optim.AdamW, lr=1e-9)
    return trained, _seconds(optimiser.step, policy.device)


def _tokens(count: int, seed: int) -> list[int]:
    """Token ids that every vocabulary has."""
    return [10 + (7 * seed + 13 * place) % 200 for place in range(count)]
