"""What the decode loop and what runs the model for it say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrhf.common.errors import UserError


@dataclass(frozen=True)
class Advance:
    """What a policy does next: the live ``slots`` [R] (query · width + slot), each one's ``parents`` [R] (the slot it
    continues) and the ``tokens`` [R] it appends."""

    slots: Tensor
    parents: Tensor
    tokens: Tensor


class Stepper(Protocol):
    """Runs a model over queries and then one token a slot at a time; both return logits.

    Raises:
        UserError: the outputs are no finite numbers.
    """

    def __init__(
        self, model: PreTrainedModel, queries: Sequence[list[int]], width: int, max_new_tokens: int
    ) -> None: ...

    def prefill(self) -> Tensor: ...

    def step(self, advance: Advance) -> Tensor: ...


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def check_finite(model: PreTrainedModel, numbers: Tensor) -> None:
    """Raise ``UserError`` where ``numbers``, a model's outputs, are not all finite."""
    if not bool(torch.isfinite(numbers).all()):
        raise UserError(
            f"{model.config._name_or_path or type(model).__name__}: its outputs are no finite numbers, so nothing can "
            "be drawn from them. Its weights may be damaged, or overflow in their type (try --dtype float32)"
        )
