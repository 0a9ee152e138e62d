"""What the decode loop and what runs the model for it say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrhf.common.errors import UserError
from rrhf.models.kernels.choice import kernels_for


@dataclass(frozen=True)
class Advance:
    """What a policy does next: the live ``slots`` [R] (query · width + slot), each one's ``parents`` [R] (the slot it
    continues) and the ``tokens`` [R] it appends."""

    slots: Tensor
    parents: Tensor
    tokens: Tensor


class Stepper(Protocol):
    """Runs a model over queries and then one token a slot at a time; both return logits.

    ``finite`` raises ``UserError`` when the outputs are no finite numbers.
    """

    finite: FiniteCheck

    def __init__(
        self, model: PreTrainedModel, queries: Sequence[list[int]], width: int, max_new_tokens: int
    ) -> None: ...

    def prefill(self) -> Tensor: ...

    def step(self, advance: Advance) -> Tensor: ...


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


class FiniteCheck:
    """Whether a model's outputs are finite; looked at now and then, because a look waits for the device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.steps = model, 0
        device = device_of(model)
        self.every = kernels_for(device).steps_between_checks()
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, numbers: Tensor) -> None:
        """The outputs of a step; the first ones are looked at at once."""
        self.finite = self.finite & torch.isfinite(numbers).all()
        if self.steps % self.every == 0:
            self.look()
        self.steps += 1

    def look(self) -> None:
        """Raise ``UserError`` where outputs were not finite."""
        if not bool(self.finite):
            name = self.model.config._name_or_path or type(self.model).__name__
            raise UserError(
                f"{name}: its outputs are no finite numbers, so nothing can be drawn from them. Its weights may be "
                "damaged, or overflow in their type (try --dtype float32)"
            )
