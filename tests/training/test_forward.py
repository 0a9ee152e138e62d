"""From the device to the CPU: one copy a forward pass, whatever comes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rrhf.models.tokenization import EncodedRecord
from rrhf.training.forward import IDLE, accept_records, forward_records
from support.models import tiny_model


class Transfers(TorchDispatchMode):
    """Counts what waits for a device: copies to the CPU and numbers read from it; notes fp64 tensors there."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.doubles = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        on_device = [x for x in torch.utils._pytree.tree_leaves(args) if getattr(x, "is_cuda", False)]
        made = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        name = func._schema.name
        self.count += bool(on_device) and (any(not x.is_cuda for x in made) or "local_scalar" in name)
        self.doubles += sum(x.is_cuda and x.dtype == torch.float64 for x in made)
        return result


class OnDevice(torch.nn.Module):
    """Gives what a policy's ranking pass gives, on a GPU."""

    def __init__(self, router: bool) -> None:
        super().__init__()
        self.router = router

    def forward(self, **kwargs: Any) -> dict[str, Any]:
        sums = torch.empty(5, device="cuda")
        router = torch.empty((), device="cuda", dtype=torch.bfloat16) if self.router else None
        return {"sums": sums, "router_loss": router}


@pytest.mark.parametrize("router", [False, True])
def test_one_copy_a_forward(router: bool) -> None:
    with FakeTensorMode(), Transfers() as transfers:  # tensors of a GPU without one: shapes, types and devices
        outputs = forward_records(OnDevice(router), [IDLE], "tree")
    assert outputs.sums.device.type == "cpu"
    assert outputs.sums.shape == (5,)
    assert (outputs.router_loss is not None) is router
    if outputs.router_loss is not None:
        assert outputs.router_loss.device.type == "cpu"
        assert outputs.router_loss.shape == ()
    assert transfers.count == 1
    assert transfers.doubles == 0


class Waits(TorchDispatchMode):
    """Counts what would wait for a device, with ``meta`` in its place: numbers read from it, copies to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x for x in tensors if x.is_meta]
        name = func._schema.name.removeprefix("aten::")
        if on_device and name in ("_local_scalar_dense", "is_nonzero"):
            self.count += 1
            return 1
        if on_device and name == "_to_copy" and torch.device(kwargs.get("device", "meta")).type == "cpu":
            self.count += 1
            return torch.zeros(on_device[0].shape, dtype=kwargs.get("dtype") or on_device[0].dtype)
        assert name not in ("nonzero", "masked_select", "unique_dim", "_unique2"), f"{name} asks the device for a size"
        return func(*args, **kwargs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "qwen3", "gpt2"])
def test_a_forward_and_backward_pass_wait_for_the_device_twice_at_most(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # meta is no device that it knows
    records = [EncodedRecord("a", [1, 2, 3], [[4, 5], [6, 7, 8]], [0.0, 1.0]), EncodedRecord("b", [1], [[2]], [0.0])]
    model = tiny_model(family).to("meta").train()
    accept_records(model)
    with Waits() as waits:
        outputs = forward_records(model, records, "tree", keep_logits=True)
        outputs.sums.sum().backward()
    assert outputs.sums.shape == (3,) and outputs.sums.device.type == "cpu"
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert 1 <= waits.count <= 2
