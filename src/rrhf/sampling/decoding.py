"""The decode loop that all sampling policies share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
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
) -> list[list[Response]]:
    """Draw responses to ``queries`` (token ids) by ``policy``.

    Args:
        model: in evaluation mode.
        queries: token ids; none is empty.
        policy: its state for these queries.
        max_new_tokens: most tokens of a response.
        path: "tree" for models that take our attention, "padded" for others (transformers' own cache, slower).
        nucleus: another model of the same kind that says which tokens may be drawn at all.

    Returns:
        For each query its responses, in the policy's order.
    """
    make = STEPPERS[path]
    if path == "tree" and getattr(policy, "independent", False) and policy.width > 1 and max_new_tokens >= LONG:
        make = SlotColumns
    models = [model] if nucleus is None else [model, nucleus.model]
    steppers = [make(each, queries, policy.width, max_new_tokens) for each in models]
    stepper = steppers[0] if nucleus is None else NucleusStepper(steppers[0], steppers[1], nucleus.top_p)
    rows, device = len(queries) * policy.width, device_of(model)
    with contextlib.ExitStack() as stack:
        for causal in map(causal_lm, models if path == "tree" else []):
            stack.enter_context(kernels_for(device).packed(causal, rows, max_new_tokens))
            stack.enter_context(our_attention(causal))
        slots = torch.arange(len(queries), device=device) * policy.width
        advance = policy.advance(stepper.prefill(), slots)
        while len(advance.slots):
            advance = policy.advance(stepper.step(advance), advance.slots)
        stepper.finite.look()
    return policy.results()
