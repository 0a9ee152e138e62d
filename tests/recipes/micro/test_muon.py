"""Muon against its definition by singular values, and against torch's own where both can be."""

from __future__ import annotations

import copy

import pytest
import torch

from rrhf.recipes.micro.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5)])
def test_the_iteration_works_on_the_singular_values_alone(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    values = values / values.norm()
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    found = orthogonalised(matrix)
    assert torch.allclose(found, left @ torch.diag(values) @ right, atol=1e-6)
    assert values.min() > 0.6 and values.max() < 1.3


def test_three_steps_are_those_of_torch() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(10, 3)
    theirs, before = copy.deepcopy(model), copy.deepcopy(model)
    ours = Muon([model.weight], [model.bias], lr=1e-2)
    rivals = [
        torch.optim.Muon([theirs.weight], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([theirs.bias], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for _ in range(3):
        x = torch.randn(20, 10)
        for each in (model, theirs):
            each.zero_grad()
            (each(x) ** 2).mean().backward()
        ours.step()
        for rival in rivals:
            rival.step()
    for mine, other, start in zip(model.parameters(), theirs.parameters(), before.parameters(), strict=True):
        # torch orthogonalises in bfloat16
        assert float((mine - other).norm() / (mine - start).norm()) < 0.05


def test_a_restored_optimiser_goes_on_alike() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    ours = Muon([model.weight], [model.bias], lr=1e-2)

    def step(of: torch.nn.Linear, optimiser: Muon) -> None:
        optimiser.zero_grad()
        (of(torch.arange(8.0).reshape(2, 4)) ** 2).mean().backward()
        optimiser.step()

    step(model, ours)
    copied = copy.deepcopy(model)
    other = Muon([copied.weight], [copied.bias], lr=1e-2)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    step(model, ours)
    step(copied, other)
    assert torch.equal(model.weight, copied.weight) and torch.equal(model.bias, copied.bias)
