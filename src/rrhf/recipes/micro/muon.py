"""Muon (Jordan et al. 2024): for small models on a CPU, as far in a fifth of the tokens as AdamW.

The step of a matrix is its momentum with all singular values brought near 1. ``torch.optim.Muon`` does that in
bfloat16, which processors without instructions for it compute hundreds of times slower than float32; this is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration, steepest at 0
ITERATIONS = 5
RMS = 0.2  # of a step's entries, at learning rate 1: about AdamW's, so that one rate and weight decay serve both


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """U Vᵀ, nearly, of a matrix U S Vᵀ [m, n]: its singular values come to lie between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.AdamW):
    """Muon for matrices, AdamW for the rest.

    Args:
        matrices: parameters [m, n] that multiply activations.
        others: embeddings, output layers, norms, biases.
        lr, weight_decay: of both; weight decay acts on matrices alone.
        momentum: of Muon, in Nesterov's way.
        betas: of AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        others: Iterable[torch.nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "weight_decay": weight_decay, "momentum": momentum},
            {"params": list(others), "weight_decay": 0.0, "momentum": None},
        ]
        super().__init__(groups, lr=lr, betas=betas)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if group["momentum"] is not None:
                self._step_matrices(group)
        self.param_groups = [group for group in groups if group["momentum"] is None]
        super().step()
        self.param_groups = groups
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # not used here; AdamW looks for it in what is restored
                state["momentum"] = torch.zeros_like(parameter)
            average = state["momentum"]
            average.lerp_(parameter.grad, 1 - group["momentum"])
            step = orthogonalised(parameter.grad.lerp(average, group["momentum"]))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(step, alpha=-group["lr"] * RMS * max(parameter.shape) ** 0.5)
