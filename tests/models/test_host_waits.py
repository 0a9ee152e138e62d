"""A tree pass on a device that is not there ("meta": shapes alone): how often a host would wait for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rrhf.models.kernels.choice import ask_for_flex
from rrhf.models.kernels.cuda.flex_attention import FlexTrees
from rrhf.models.shared_prefix import lay_out, tree_logprobs
from support.models import tiny_model
from support.trees import RECORDS


class Waits(TorchDispatchMode):
    """Counts copies between host and device: ``copies``, and of these those that the host waits for: ``waits``.

    What else makes a host wait, a number read or a size that depends on numbers, raises on a device without numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies, self.waits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, options, result)) if isinstance(x, Tensor)]
        if len({x.device.type for x in tensors if x.dim()}) > 1:
            self.copies += 1
            asked_not_to = func is torch.ops.aten.copy_.default and args[2:] == (True,)
            self.waits += not (asked_not_to or options.get("non_blocking"))
        return result


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral", "gemma2", "gemma3"])
def test_a_tree_pass_makes_one_copy_and_waits_for_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # it knows no "meta"
    model = tiny_model(family).to("meta").train()
    with Waits() as counted:
        logprobs = tree_logprobs(model, RECORDS)
        logprobs.sums.sum().backward()
    assert logprobs.sums.device.type == "meta"
    assert all(p.grad is not None for p in model.parameters())
    assert (counted.copies, counted.waits) == (1, 0)


def test_waits_are_counted() -> None:
    """What the pass did before: a waiting copy for each of its seven vectors."""
    with Waits() as counted:
        for _ in range(7):
            torch.tensor([1, 2]).to("meta")
    assert (counted.copies, counted.waits) == (7, 7)
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(3, device="meta").sum().item()


def test_a_mask_of_blocks_is_one_copy_a_window() -> None:
    model = tiny_model("gemma2")
    ask_for_flex(model)
    forest = lay_out(RECORDS, "meta", flex=True)
    assert isinstance(forest._attention, FlexTrees)
    with Waits() as counted:
        for window in (None, 8, None, 8):
            forest._attention.mask(window)
    assert (counted.copies, counted.waits) == (2, 0)
