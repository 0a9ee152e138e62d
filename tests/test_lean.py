"""Lean modules against transformers' own: the same numbers and gradients with less kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import in_fp64, tiny_model
from rrhf.attention import our_attention
from rrhf.lean import lean

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(40)[None] % 97


def changed(model: Any) -> set[str]:
    """The classes of modules whose forward pass is replaced."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def outcome(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=IDS).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.dtype)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad((logits * weights).sum(), [p for p in model.parameters() if p.requires_grad])
    return logits.detach(), dict(zip(names, found, strict=True))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP"}),
        ("qwen2", {"Qwen2RMSNorm", "Qwen2MLP"}),
        ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP"}),
        ("mistral", {"MistralRMSNorm", "MistralMLP"}),
        ("mixtral", {"MixtralRMSNorm"}),
        ("gemma2", set()),  # 1 + w, and a tanh GELU
        ("gpt2", set()),
    ],
)
def test_which_modules_are_recognised(family: str, expected: set[str]) -> None:
    model = tiny_model(family)
    for module in model.modules():  # ones would hide what a norm does with its weight
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.normal_(module.weight)
    with our_attention(model):
        assert changed(model) == expected
    assert changed(model) == set()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "mistral"])
def test_numbers_and_gradients_are_those_of_transformers(family: str) -> None:
    model = in_fp64(tiny_model(family))
    stock, stock_gradients = outcome(model)
    with lean(model):
        assert len(changed(model)) == 2  # a norm and an MLP
        found, gradients = outcome(model)
    assert torch.allclose(found, stock, atol=1e-11, rtol=0)
    for name, gradient in stock_gradients.items():
        assert float(gradient.norm()) > 0, name
        assert torch.allclose(gradients[name], gradient, atol=1e-10, rtol=1e-9), name


def test_bfloat16_rounds_where_transformers_rounds() -> None:
    model = tiny_model("llama").bfloat16()
    norm = model.model.layers[0].input_layernorm
    nn.init.normal_(norm.weight)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    stock = norm(x)
    with lean(model):
        assert torch.equal(norm(x), stock)


def test_frozen_weights_get_no_gradient_and_pass_one_on() -> None:
    model = tiny_model("llama").requires_grad_(False)
    block = model.model.layers[0].mlp
    block.up_proj.weight.requires_grad_()
    x = torch.randn(5, 32, requires_grad=True)
    stock = torch.autograd.grad(block(x).sum(), [x, block.up_proj.weight])
    with lean(model):
        found = torch.autograd.grad(block(x).sum(), [x, block.up_proj.weight])
    for a, b in zip(found, stock, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def kept_bytes(compute: Callable[[], Tensor], weights: set[int]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, each storage once, weights left out."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = compute()
    assert graph.requires_grad
    return sum(seen.values())


def test_less_is_kept_for_the_backward_pass() -> None:
    model = tiny_model("llama").bfloat16()
    layer = model.model.layers[0]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = torch.randn(1, 200, 32).bfloat16().requires_grad_()

    def block() -> Tensor:
        return x + layer.mlp(layer.post_attention_layernorm(x))

    stock = kept_bytes(block, weights)
    with lean(model):
        found = kept_bytes(block, weights)
    # x, its norm, and the gate's and up projection's results, in two bytes each: nothing else
    assert found == 2 * 200 * (32 + 32 + 64 + 64)
    assert found < 0.6 * stock


def test_adapters_hooks_and_autocast_keep_transformers_forward() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    adapted = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    )
    with lean(adapted):
        assert changed(adapted) == {"LlamaRMSNorm"}
    stock = outcome(model)[0]
    calls: list[Any] = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: calls.append(1))
    with lean(model):
        assert torch.allclose(outcome(model)[0], stock, atol=1e-5)
    assert calls  # a hook on a projection still sees it
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(input_ids=IDS).logits
        with lean(model):
            assert torch.equal(model(input_ids=IDS).logits, mixed)
