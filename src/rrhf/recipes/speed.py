"""How fast a machine samples and trains: a few seconds of the work itself, on the run's own model.

Timed are both passes of a training step, the optimiser, and decoding, with queries and responses as long as the run's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rrhf.models.load import ModelSettings, load_policy
from rrhf.models.passes import response_logprobs
from rrhf.models.path_check import usable_path
from rrhf.models.tokenization import EncodedRecord
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings

# An evaluated response costs about this share of a training query's four: its query is as long, and decoding one row a
# query or four takes nearly the same time; the rest is its perplexity and a second reward.
EVALUATED_SHARE = 0.9
PROBED_QUERIES, PROBED_TOKENS = 16, 6  # what is decoded for the measurement
PROBED_RECORDS = 3  # in one pair of passes: a single record's products are too small to be as fast as a step's


@dataclass(frozen=True)
class Shape:
    """Tokens of a query and of a response that are usual in a run, and how many responses a record to train on has."""

    query: int
    response: int
    responses: int


@dataclass(frozen=True)
class Speed:
    """Seconds of this machine for each thing a run does: a query sampled, a query trained on, an optimiser step."""

    sampled: float
    trained: float
    optimised: float


def measure_machine(model: ModelSettings, shape: Shape, sampling: SamplingSettings) -> Speed:
    """Time the run's work on its own model: passes of a few records, an optimiser step, some decoded tokens."""
    policy, tokenizer = load_policy(model, training=True)
    return Speed(_sampling_seconds(policy, tokenizer, shape, sampling), *_training_seconds(policy, shape))


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


def _sampling_seconds(policy: Any, tokenizer: Any, shape: Shape, sampling: SamplingSettings) -> float:
    """Seconds a query: its pass, and as many steps as a response has tokens."""
    queries = [_tokens(shape.query, number) for number in range(PROBED_QUERIES)]
    keys, ends = [str(number) for number in range(PROBED_QUERIES)], [set[int]() for _ in queries]

    def draw(tokens: int) -> float:
        sampler = Sampler(policy, tokenizer, replace(sampling, max_new_tokens=tokens))
        return _seconds(lambda: sampler.draw(queries, keys, ends), policy.device)

    first, more = draw(1), draw(1 + PROBED_TOKENS)
    step = max(more - first, 0.0) / PROBED_TOKENS
    return (first + shape.response * step) / PROBED_QUERIES


def _training_seconds(policy: Any, shape: Shape) -> tuple[float, float]:
    """Seconds a record for both passes over several, and for an optimiser step."""
    import torch

    from rrhf.training.master_weights import MasterWeights

    k = shape.responses
    responses = [_tokens(shape.response, 1 + number) for number in range(k)]
    records = [EncodedRecord("probe", _tokens(shape.query, 0), responses, [None] * k)] * PROBED_RECORDS
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
