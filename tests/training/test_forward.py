"""From the device to the CPU: one copy a forward pass, whatever comes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rrhf.training.forward import IDLE, forward_records


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
