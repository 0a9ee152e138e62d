"""bfloat16 weights with fp32 masters: a step in buckets is one step, with fewer gradients in fp32 at once."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from rrhf.training import master_weights
from rrhf.training.master_weights import MasterWeights

SIZES = [(3, 4), (7,), (5, 5), (2,), (30,)]
OPTIMISERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw, one by one": (torch.optim.AdamW, {"lr": 1e-2, "foreach": False}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
    # as --optim adafactor makes it
    "adafactor of transformers": (Adafactor, {"lr": 1e-2, "scale_parameter": False, "relative_step": False}),
}
if importlib.util.find_spec("bitsandbytes") is not None:  # make test-8bit
    import bitsandbytes

    # as --optim adamw_bnb_8bit makes it, but with moments of 8 bits for tensors as small as these
    OPTIMISERS["8-bit adamw"] = (bitsandbytes.optim.AdamW, {"lr": 1e-2, "optim_bits": 8, "min_8bit_size": 8})


def trained(name: str, bucket: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], dict[str, Any], list[int]]:
    """Weights and states after four steps, and how many fp32 gradients each inner step saw."""
    monkeypatch.setattr(master_weights, "BUCKET", bucket)
    generator = torch.Generator().manual_seed(0)

    def values(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    # two in fp32, which have no copy; the fourth gets no gradient
    types = [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    parameters = [nn.Parameter(values(shape).to(dtype)) for shape, dtype in zip(SIZES, types, strict=True)]
    kind, options = OPTIMISERS[name]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}]
    optimiser = MasterWeights(groups, kind, **options)
    seen: list[int] = []
    optimiser.inner.register_step_pre_hook(
        lambda inner, args, kwargs: seen.append(sum(m.numel() for m in optimiser.masters if m.grad is not None))
    )
    for _ in range(4):
        for index, parameter in enumerate(parameters):
            parameter.grad = None if index == 3 else values(SIZES[index]).to(parameter.dtype)
        before = [parameter.grad for parameter in parameters]
        optimiser.step()
        assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, before, strict=True))
    return [p.detach() for p in parameters], optimiser.state_dict(), seen


def flat(state: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_in_buckets_is_one_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, state, seen = trained(name, 1000, monkeypatch)
    assert seen == [12 + 7 + 25 + 30] * 4
    for bucket, at_once in ((20, [19, 25, 0, 30]), (1, [12, 7, 25, 0, 30])):
        same, same_state, few = trained(name, bucket, monkeypatch)
        assert few == at_once * 4
        assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
        assert len(flat(state)) == len(flat(same_state)) > len(SIZES) - 3
        assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(same_state), strict=True))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_resumed_optimiser_goes_on_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master_weights, "BUCKET", 20)
    kind, options = OPTIMISERS[name]
    shapes = [(5, 4), (6,), (3, 7)]

    def made() -> tuple[list[nn.Parameter], MasterWeights]:
        generator = torch.Generator().manual_seed(0)
        types = [torch.bfloat16, torch.float32, torch.bfloat16]
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        parameters = [nn.Parameter(value.to(dtype)) for value, dtype in zip(values, types, strict=True)]
        return parameters, MasterWeights([{"params": parameters}], kind, **options)

    def steps(parameters: list[nn.Parameter], optimiser: MasterWeights, numbers: range) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for parameter, shape in zip(parameters, shapes, strict=True):
                parameter.grad = torch.randn(shape, generator=generator).to(parameter.dtype)
            optimiser.step()

    whole, optimiser = made()
    steps(whole, optimiser, range(4))
    stopped, first = made()
    steps(stopped, first, range(2))
    file = io.BytesIO()
    torch.save({"weights": stopped, "optimiser": first.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    resumed, second = made()
    with torch.no_grad():
        for parameter, value in zip(resumed, kept["weights"], strict=True):
            parameter.copy_(value)
    second.load_state_dict(kept["optimiser"])
    steps(resumed, second, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(flat(second.state_dict()), flat(optimiser.state_dict()), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, made()[0], strict=True))
