"""Products in fp32 by oneDNN against torch's own, wherever the test runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rrhf.models.attention import our_attention
from rrhf.models.kernels.cpu import products
from support.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN is taken on this processor too; returns the shapes of its results."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    shapes: list[tuple[int, ...]] = []
    product = products._onednn

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = product(x, weight, bias)
        shapes.append(tuple(found.shape))
        return found

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_onednn", counted)
    return shapes


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, exact: Tensor) -> bool:
    return found.dtype == torch.float32 and torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("a_lies", [False, True])
@pytest.mark.parametrize("b_lies", [False, True])
def test_products_of_matrices_however_they_lie(onednn: list[tuple[int, ...]], a_lies: bool, b_lies: bool) -> None:
    a = matrix(33, 70, 0) if not a_lies else matrix(70, 33, 0).t()
    b = matrix(70, 21, 1) if not b_lies else matrix(21, 70, 1).t()
    c = matrix(33, 21, 2)
    exact = a.double() @ b.double()
    assert close(products.matmul(a, b), exact)
    out = torch.empty(66, 21)[::2]
    assert products.matmul(a, b, out=out) is out and close(out, exact)
    kept = c.clone()
    assert close(products.addmm(c, a, b), exact + c.double())
    assert torch.equal(c, kept)  # not added in place
    assert onednn == [(33, 21), (33, 21)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(onednn: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    a, b = matrix(8, 9, 0).to(dtype), matrix(9, 7, 1).to(dtype)
    assert torch.equal(products.matmul(a, b), a @ b)
    assert torch.equal(products.linear(a, b.t()), nn.functional.linear(a, b.t()))
    assert not onednn


def test_matrices_without_rows(onednn: list[tuple[int, ...]]) -> None:
    assert products.matmul(torch.empty(0, 5), matrix(5, 4, 0)).shape == (0, 4)
    assert products.linear(torch.empty(2, 0, 5), matrix(4, 5, 0)).shape == (2, 0, 4)
    assert not onednn


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_and_its_gradients(onednn: list[tuple[int, ...]], bias: bool) -> None:
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(2, 15, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(2, 15, 40, generator=torch.Generator().manual_seed(1))
    inputs = [x, *layer.parameters()]
    stock = layer(x)
    exact = torch.autograd.grad((stock * weights).sum(), inputs)
    found = products.Linear.apply(x, layer.weight, layer.bias)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    assert torch.allclose(found, stock, atol=1e-5)
    for a, b in zip(gradients, exact, strict=True):
        assert float(b.norm()) > 0 and torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert onednn == [(2, 15, 40), (30, 24), (40, 24)]


def test_a_frozen_layer_keeps_no_input(onednn: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(24, 40).requires_grad_(False)
    x = torch.randn(15, 24, requires_grad=True)
    found = products.Linear.apply(x, layer.weight, layer.bias)
    assert [None if kept is None else tuple(kept.shape) for kept in found.grad_fn.saved_tensors] == [None, (40, 24)]
    assert torch.allclose(torch.autograd.grad(found.sum(), x)[0], layer.weight.sum(0).expand(15, -1), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "mistral"])
def test_a_model_on_them_gives_its_own_numbers(onednn: list[tuple[int, ...]], family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(1, 30)[None]
    stock = model(input_ids=ids).logits
    expected = torch.autograd.grad(stock.square().mean(), list(model.parameters()), allow_unused=True)
    assert not onednn
    with our_attention(model):
        found = model(input_ids=ids).logits
        gradients = torch.autograd.grad(found.square().mean(), list(model.parameters()), allow_unused=True)
    assert len(onednn) > 10
    assert torch.allclose(found, stock, atol=1e-5)
    for (name, _), a, b in zip(model.named_parameters(), gradients, expected, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize(
    ("processor", "capability", "expected"),
    [
        ("vendor_id\t: AuthenticAMD", "AVX512", True),
        ("vendor_id\t: GenuineIntel", "AVX512", False),
        ("vendor_id\t: AuthenticAMD", "AVX2", False),
    ],
)
def test_which_processors_take_it(
    processor: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this build of torch lacks MKL or oneDNN")
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.onednn_is_faster.__wrapped__() is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_model_its_numbers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor is too old for oneDNN's products in bfloat16")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    model = tiny_model("llama-tied").to(dtype)
    linears = [module.weight for module in model.modules() if type(module) is nn.Linear]
    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        stock = model(input_ids=ids).logits
        with products.packed(model, 16), our_attention(model):
            assert all(products.is_packed(weight) for weight in linears)
            found = model(input_ids=ids).logits
    assert not any(products.is_packed(weight) for weight in linears)
    assert torch.allclose(found, stock, atol=1e-5 if dtype == torch.float32 else 0.05)


def laid_out(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if products.is_packed(weight)]


def test_what_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    model = tiny_model("llama")
    with products.packed(model.double(), 16):
        assert not laid_out(model)
    monkeypatch.setattr(products, "PACKED_BYTES", 1000)
    with products.packed(model.float(), 16):
        assert not laid_out(model)
    monkeypatch.setattr(products, "PACKED_BYTES", 1 << 31)
    with products.packed(model, 16):
        assert len(laid_out(model)) == 15  # and in another way nothing would be
