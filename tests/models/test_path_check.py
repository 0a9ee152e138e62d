"""Which models take the tree: the check must refuse those whose numbers it would change, by more than one sign."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rrhf.common.errors import UserError
from rrhf.common.logging import set_up_logging
from rrhf.models import path_check
from rrhf.models.kernels import reference
from rrhf.models.kernels.choice import KERNELS
from rrhf.models.path_check import usable_path
from support.families import FAMILIES
from support.models import tiny_model
from support.trees import path_and_reason, silently

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["lfm2", "qwen3.5", "stablelm", "deepseek-v3.2"])
def test_models_that_mix_tokens_in_other_ways_are_refused(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As models too large for a copy in fp32 are checked, whose numbers may be apart by rounding."""
    monkeypatch.setattr(path_check, "COPIED_PARAMETERS", 0)
    path, why = path_and_reason(FAMILIES[family].make().to(dtype))
    assert path == "padded"
    assert FAMILIES[family].reason in why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_others_take_the_tree_without_a_copy(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_check, "COPIED_PARAMETERS", 0)
    assert silently(tiny_model(family).to(dtype), longest_row=40) == "tree"


@pytest.mark.parametrize("family", ["phimoe", "qwen2-moe"])
def test_a_window_that_the_mask_alone_tells(family: str) -> None:
    """Known to samplers too, which do not know how long their rows will be."""
    path, why = path_and_reason(FAMILIES[family].make(), 0)
    assert path == "padded" and FAMILIES[family].reason in why
    assert silently(FAMILIES[family].make(sliding_window=None, use_sliding_window=False), 40) == "tree"
    assert silently(FAMILIES[family].make(sliding_window=512), 40) == "tree"  # no row outgrows it


def test_a_window_that_the_family_does_not_read() -> None:
    model = FAMILIES["llama"].make(sliding_window=8)
    assert silently(model, 40) == "tree" and model.config.sliding_window == 8


def test_a_response_that_leaks_into_the_next_is_noticed_by_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leak too small for the comparison of numbers in bfloat16."""
    visible = reference.visible

    def one_cell_too_many(ends: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
        seen = visible(ends, positions, window)
        seen[-1, 5] = True  # the last response's last input reads the first response's first token
        return seen

    monkeypatch.delitem(KERNELS, "cpu")
    monkeypatch.setattr(path_check, "COPIED_PARAMETERS", 0)
    model = tiny_model("llama").bfloat16()
    assert path_and_reason(model, 0) == ("tree", "")
    monkeypatch.setattr(reference, "visible", one_cell_too_many)
    path, why = path_and_reason(model, 0)
    assert path == "padded"
    assert "exchanging one response changes another's" in why


def test_a_layer_that_asks_twice_is_noticed() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[0], layers[0]])
    path, why = path_and_reason(model)
    assert path == "padded"
    assert "0 of its 2 layers attended by the tree once, 2 calls in all" in why


@pytest.mark.parametrize("name", ["sliding_window", "attention_chunk_size", "index_topk"])
def test_the_check_is_longer_than_windows_chunks_and_chosen_keys_where_the_data_is(name: str) -> None:
    model = tiny_model("llama")
    setattr(model.config, name, 20)
    assert len(path_check._probe(model, 20).query) == 5
    assert len(path_check._probe(model, 21).query) == 22


# --- precision, memory, what is said -------------------------------------------------------------------------------


def precisions() -> tuple[Any, ...]:
    backends = torch.backends
    devices = (backends.cuda.matmul, backends.mkldnn.matmul)
    return torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, [d.fp32_precision for d in devices]


@pytest.fixture
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """``medium`` is TF32 on GPUs, which three switches turn on, and bfloat16 in oneDNN; or what torch starts with."""
    if request.param != "highest":
        torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")
    for device in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        device.fp32_precision = "none"


@pytest.mark.parametrize("matmul_precision", ["highest", "medium"], indirect=True)
@pytest.mark.parametrize("outcome", ["tree", "padded"])
def test_the_check_multiplies_in_full_precision_and_puts_back_what_was(outcome: str, matmul_precision: str) -> None:
    model, before, within = tiny_model("llama"), precisions(), []

    def note(*_: Any) -> None:
        within.append(precisions())
        if outcome == "padded":
            raise ValueError("of the model's own code")

    model.model.layers[0].register_forward_hook(note)
    assert path_and_reason(model)[0] == outcome
    assert before[:2] == (matmul_precision, matmul_precision == "medium")
    assert {str(seen) for seen in within} == {str(("highest", False, ["ieee", "ieee"]))}
    assert precisions() == before


def out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 2.00 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_running_out_of_memory_is_no_reason_for_padded_rows(error: Exception) -> None:
    def refuse(*_: Any) -> None:
        raise error

    model = tiny_model("llama").train()
    model.model.layers[1].register_forward_hook(refuse)
    with pytest.raises(UserError, match=r"torch.float32 on cpu: out of memory.* --dtype .*--max_tokens_per_forward"):
        usable_path(model)
    assert model.training


def test_without_memory_for_a_copy_the_model_itself_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").bfloat16()
    monkeypatch.setattr(type(model), "float", out_of_memory)
    assert path_and_reason(model) == ("tree", "")
    monkeypatch.setattr(reference, "visible", lambda ends, *_: torch.ones(len(ends), len(ends)).tril().bool())
    monkeypatch.delitem(KERNELS, "cpu")
    path, why = path_and_reason(model)
    assert path == "padded"
    assert "exchanging one response changes another's" in why


def test_the_reason_is_logged_once_a_model(tmp_path: Path) -> None:
    """In log.txt, though training, sampling and evaluation all ask."""
    logger = logging.getLogger("rrhf")
    before = logger.handlers[:], logger.propagate, logger.level
    try:
        set_up_logging(tmp_path / "log.txt")
        model = tiny_model("bloom")
        assert [usable_path(model) for _ in range(3)] == ["padded"] * 3
        assert usable_path(tiny_model("bloom", seed=1)) == "padded"
        logged = (tmp_path / "log.txt").read_text(encoding="utf-8")
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:], logger.propagate, logger.level = before
    assert logged.count("does not take the shared-prefix tree (its attention cannot be exchanged)") == 2


class Int8Linear(nn.Module):
    """Weights in int8 by row; with ``rounded`` its input too, all rows by the largest number of them."""

    def __init__(self, plain: nn.Linear, rounded: bool) -> None:
        super().__init__()
        self.scale = plain.weight.detach().abs().amax(dim=1) / 127
        quantised = (plain.weight.detach() / self.scale[:, None]).round().to(torch.int8)
        self.weight, self.rounded = nn.Parameter(quantised, requires_grad=False), rounded

    def forward(self, x: Tensor) -> Tensor:
        if self.rounded:
            step = x.abs().amax() / 127
            x = (x / step).round() * step
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None])


def quantised(rounded: bool) -> Any:
    """As transformers hands such models out: they refuse to be cast."""
    model = tiny_model("llama").bfloat16()
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child, rounded))
    model.is_quantized = True
    return model


@pytest.mark.parametrize("rounded", [False, True])
def test_quantised_weights_take_the_tree(rounded: bool) -> None:
    assert path_and_reason(quantised(rounded)) == ("tree", "")


@pytest.mark.parametrize("rounded", [False, True])
def test_a_leak_between_responses_is_noticed_with_quantised_weights(
    rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantised(rounded)
    monkeypatch.delitem(KERNELS, "cpu")
    assert path_and_reason(model) == ("tree", "")
    monkeypatch.setattr(reference, "visible", lambda ends, *_: torch.ones(len(ends), len(ends)).tril().bool())
    path, why = path_and_reason(model)
    assert path == "padded"
    assert "differ by" in why or "exchanging" in why
