"""The decode loop that all sampling policies share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrhf.models.attention import our_attention
from rrhf.models.forward import causal_lm
from rrhf.models.kernels.choice import kernels_for
from rrhf.sampling.nucleus import Nucleus, NucleusStepper
from rrhf.sampling.shared_cache import SharedCache
from rrhf.sampling.slot_columns import SlotColumns
from rrhf.sampling.stepping import Advance, Stepper, device_of
from rrhf.sampling.transformers_cache import TransformersCache


@dataclass(frozen=True)
class Response:
    """A response's ``tokens`` without its end token; ``finish`` is "stop" or "length"; ``end`` the token that ended it,
    where the policy says it."""

    tokens: list[int]
    finish: str
    end: int | None = field(default=None, compare=False)

    @property
    def drawn(self) -> list[int]:
        """All tokens that were drawn for it, its end token too."""
        return self.tokens if self.end is None else [*self.tokens, self.end]


class Policy(Protocol):
    """A sampling policy at work on one batch of queries."""

    width: int
    # Policies may have ``independent: bool``: their slots continue themselves alone, never another slot.

    def advance(self, logits: Tensor, slots: Tensor) -> Advance:
        """Choose the next tokens from ``logits`` [R, V] of the live ``slots`` [R]; at first one slot a query."""
        ...

    def results(self) -> list[list[Response]]:
        """The responses of every query, when no slot is live any more."""
        ...


LONG = 1024  # new tokens from which reading its own columns alone pays for a slot

STEPPERS: dict[str, type[Stepper]] = {"tree": SharedCache, "padded": TransformersCache}


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    queries: Sequence[list[int]],
    policy: Policy,
    max_new_tokens: int,
    path: str = "tree",
    nucleus: Nucleus | None = None,
    given_up: threading.Event | None = None,
) -> list[list[Response]]:
    """Draw responses to ``queries`` (token ids) by ``policy``.

    Args:
        model: in evaluation mode.
        queries: token ids; none is empty.
        policy: its state for these queries.
        max_new_tokens: most tokens of a response.
        path: "tree" for models that take our attention, "padded" for others (transformers' own cache, slower).
        nucleus: another model of the same kind that says which tokens may be drawn at all.
        given_up: once it is set, decoding ends with what there is.

    Returns:
        For each query its responses, in the policy's order.
    """
    make = STEPPERS[path]
    if path == "tree" and getattr(policy, "independent", False) and policy.width > 1 and max_new_tokens >= LONG:
        make = SlotColumns
    steppers = [make(each, queries, policy.width, max_new_tokens) for each in models_of(model, nucleus)]
    stepper = steppers[0] if nucleus is None else NucleusStepper(steppers[0], steppers[1], nucleus.top_p)
    with prepared(models_of(model, nucleus), len(queries) * policy.width, max_new_tokens, path):
        slots = torch.arange(len(queries), device=device_of(model)) * policy.width
        advance = policy.advance(stepper.prefill(), slots)
        while len(advance.slots) and not (given_up and given_up.is_set()):
            advance = policy.advance(stepper.step(advance), advance.slots)
        stepper.finite.look()
    return policy.results()


def models_of(model: PreTrainedModel, nucleus: Nucleus | None) -> list[PreTrainedModel]:
    """All that run in a decode loop."""
    return [model] if nucleus is None else [model, nucleus.model]


@contextlib.contextmanager
def prepared(models: Sequence[PreTrainedModel], rows: int, max_new_tokens: int, path: str) -> Iterator[None]:
    """While it lasts, the models are made for decoding ``rows`` rows at a time; within another one it does nothing."""
    with contextlib.ExitStack() as stack:
        for causal in map(causal_lm, models if path == "tree" else []):
            stack.enter_context(kernels_for(device_of(causal)).packed(causal, rows, max_new_tokens))
            stack.enter_context(our_attention(causal))
        yield
