"""Lean modules against transformers' own: the same numbers and gradients with less kept for the backward pass."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from rrhf.models.attention import our_attention
from rrhf.models.kernels.cpu.lean_modules import lean
from rrhf.models.kernels.cpu.products import packed
from support.models import in_fp64, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(40)[None] % 97


def changed(model: Any) -> set[str]:
    """The classes of modules whose forward pass is replaced, but for linear layers (test_products.py)."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)} - {"Linear"}


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


def encoder(activation: str = "gelu") -> Any:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=64, initializer_range=0.4, hidden_act=activation)  # fmt: skip
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("laid_out", [False, True])
@torch.no_grad()
def test_gelu_is_part_of_its_product(dtype: torch.dtype, laid_out: bool) -> None:
    model = encoder()
    exact = copy.deepcopy(model).double()(input_ids=IDS).logits
    stock = model.to(dtype)(input_ids=IDS).logits
    with packed(model, 40) if laid_out else contextlib.nullcontext(), lean(model):
        assert changed(model) == {"BertIntermediate"}
        found = model(input_ids=IDS).logits
    bound = max(2 * float((stock.double() - exact).abs().max()), 1e-5)
    assert float((found.double() - exact).abs().max()) <= bound


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
@torch.no_grad()
def test_other_activations_are_left_to_transformers(activation: str) -> None:
    model = encoder(activation)
    with lean(model):
        assert changed(model) == set()


def test_gelu_with_gradients_is_transformers_own() -> None:
    model = in_fp64(encoder())
    _, stock = outcome(model)
    with lean(model):
        _, found = outcome(model)
    assert all(torch.equal(found[name], gradient) for name, gradient in stock.items())


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


def bytes_kept(compute: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that a computation leaves in its graph, by torch's own account of allocations."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = compute()
    assert result.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()) - result.nbytes


def test_less_is_kept_for_the_backward_pass() -> None:
    model = tiny_model("llama").bfloat16()
    layer = model.model.layers[0]
    x = torch.randn(1, 200, 32).bfloat16().requires_grad_()

    def block() -> Tensor:
        return x + layer.mlp(layer.post_attention_layernorm(x))

    block()
    stock = bytes_kept(block)
    with lean(model):
        block()
        found = bytes_kept(block)
    # the gate's and the up projection's results in two bytes each, and nothing else beside x itself
    assert found == 2 * 200 * (64 + 64)
    assert found < 0.5 * stock


def test_a_norm_made_again_serves_all_its_users_and_a_second_backward_pass() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0]
    x = torch.randn(3, 7, 32, requires_grad=True)

    def users() -> Tensor:
        normed = layer.input_layernorm(x)
        return (normed.transpose(0, 1) * normed.transpose(0, 1)).sum() + (normed[0] @ normed[1].t()).sum()

    stock = torch.autograd.grad(users(), x)[0]
    with lean(model):
        graph = users()
        first = torch.autograd.grad(graph, x, retain_graph=True)[0]
        assert torch.allclose(first, stock, atol=1e-5)
        assert torch.equal(torch.autograd.grad(graph, x)[0], first)


def test_a_graph_that_no_backward_pass_goes_through_is_let_go() -> None:
    """exp keeps its own result, as attention does: kept as it is, it would hold itself and all that it came from."""
    model = tiny_model("llama")
    with lean(model):
        x = torch.randn(3, 32, requires_grad=True)
        result = model.model.layers[0].input_layernorm(x).exp()
    alive = weakref.ref(x)
    assert alive() is not None
    del x, result
    gc.collect()
    assert alive() is None


def test_a_result_changed_in_place_is_kept_as_it_is() -> None:
    model = tiny_model("llama")
    norm = model.model.layers[0].input_layernorm
    x = torch.randn(7, 32, requires_grad=True)

    def changed_in_place() -> Tensor:
        return (norm(x).mul_(3.0) ** 3).sum()  # squares of a row would sum to a constant

    stock = torch.autograd.grad(changed_in_place(), x)[0]
    with lean(model):
        assert torch.allclose(torch.autograd.grad(changed_in_place(), x)[0], stock, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("part", [slice(3), slice(2, 5)])
def test_a_part_of_a_result_does_not_keep_the_whole(part: slice) -> None:
    """A view is made again from its place in the whole, wherever it begins."""
    model = tiny_model("llama")
    norm = model.model.layers[0].input_layernorm
    x, weights = torch.randn(50, 32, requires_grad=True), torch.linspace(-1, 1, 32)

    def of_a_part() -> Tensor:
        view = norm(x)[part]
        return (view * view * weights).sum()

    stock = torch.autograd.grad(of_a_part(), x)[0]
    with lean(model):
        assert bytes_kept(of_a_part) == 0
        assert torch.allclose(torch.autograd.grad(of_a_part(), x)[0], stock, rtol=1e-4, atol=1e-5)


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
