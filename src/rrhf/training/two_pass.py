"""The gradient of a record that is too large for one forward pass, with one slice of its responses in memory.

The loss L sees a response y_i through its log-probability sum s_i alone, so

    ∂L/∂θ = Σ_i ∂L/∂s_i · ∂s_i/∂θ

First pass: every s_i, slice by slice, without a graph; ∂L/∂s_i then costs the loss of k numbers.
Second pass: each slice again with a graph, and backward from Σ_i ∂L/∂s_i · s_i over its responses.
A loss over tokens sees the log-probability l_it of every one, too: Σ_i Σ_t ∂L/∂l_it · ∂l_it/∂θ comes beside it.
Both passes start a slice from the same random states, so that dropout draws the same masks.

The auxiliary loss of a mixture of experts is a mean over the n slices of a record: each weighs 1/n of the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rrhf.models.tokenization import EncodedRecord
from rrhf.training.forward import Compute


@dataclass(frozen=True)
class RandomState:
    """The random states that a forward pass on a device draws from."""

    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        gpu = None
        if device.type == "cuda":
            gpu = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            gpu = torch.mps.get_rng_state()
        return cls(torch.get_rng_state(), gpu)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.gpu, device)
        elif self.gpu is not None:
            torch.mps.set_rng_state(self.gpu)

    @contextmanager
    def replayed(self, device: torch.device) -> Iterator[None]:
        """Draw from this state inside, and go on afterwards as if nothing had been drawn."""
        after = RandomState.now(device)
        self.restore(device)
        yield
        after.restore(device)


@dataclass(frozen=True)
class FirstPass:
    """A record of k responses after its first pass.

    ``slices``: records of the same query with some of the responses each. ``states``: the random state before each of
    them. ``sums``: s, Tensor of shape (k,), a leaf that wants a gradient. ``router_loss``: the mean over slices.
    ``token_logprobs``: l of all tokens in order, Tensor of shape (Σ ‖y_i‖,), such a leaf, or None.
    """

    slices: tuple[EncodedRecord, ...]
    states: tuple[RandomState, ...]
    sums: Tensor
    router_loss: float
    token_logprobs: Tensor | None = None

    def second_passes(self, loss: Tensor, weight: float) -> list[SecondPass]:
        """What is to be run again for the gradient of ``loss``, made of the leaves, and of the router loss · weight."""
        leaves = [self.sums] if self.token_logprobs is None else [self.sums, self.token_logprobs]
        of_sums, *of_tokens = torch.autograd.grad(loss, leaves, materialize_grads=True)
        responses = [len(part.responses) for part in self.slices]
        tokens = [sum(map(len, part.responses)) for part in self.slices]
        split: list[Tensor] | list[None] = list(of_tokens[0].split(tokens)) if of_tokens else [None] * len(tokens)
        router_weight = weight / len(self.slices)
        return [
            SecondPass(part, state, gradient, router_weight, token_gradient)
            for part, state, gradient, token_gradient in zip(
                self.slices, self.states, of_sums.split(responses), split, strict=True
            )
        ]


@dataclass(frozen=True)
class SecondPass:
    """A slice that is to be run with a graph: ``gradient`` is ∂L/∂s_i of its responses, Tensor of shape (k_slice,).

    ``token_gradient``: ∂L/∂l_it of all its tokens in order, or None.
    """

    part: EncodedRecord
    state: RandomState
    gradient: Tensor
    router_weight: float
    token_gradient: Tensor | None = None

    def run(self, compute: Compute, backward: Callable[[Tensor], None], device: torch.device) -> None:
        """Forward and backward: adds this slice's part of ∂L/∂θ to the gradients."""
        with self.state.replayed(device):
            outputs = compute([self.part])
            objective = (outputs.sums * self.gradient).sum()
            if self.token_gradient is not None and outputs.token_logprobs is not None:
                objective = objective + (outputs.token_logprobs * self.token_gradient).sum()
            if outputs.router_loss is not None:
                objective = objective + outputs.router_loss * self.router_weight
            backward(objective)


@torch.no_grad()
def first_pass(slices: Sequence[EncodedRecord], compute: Compute, device: torch.device) -> FirstPass:
    """Run every slice without a graph."""
    states, sums, tokens, router = [], [], [], 0.0
    for part in slices:
        states.append(RandomState.now(device))
        outputs = compute([part])
        sums.append(outputs.sums)
        if outputs.token_logprobs is not None:
            tokens.append(outputs.token_logprobs)
        if outputs.router_loss is not None:
            router += float(outputs.router_loss) / len(slices)
    leaves = [torch.cat(values).detach().requires_grad_() for values in (sums, tokens) if values]
    return FirstPass(tuple(slices), tuple(states), leaves[0], router, leaves[1] if tokens else None)
