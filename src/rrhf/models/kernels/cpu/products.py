"""Matrix products on CPUs: fp32 by the faster of torch's two libraries, and weights laid out for few rows.

torch gives fp32 products to MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN, which torch has too,
uses their AVX-512 and is more than twice as fast (docs/benchmarks.md). Which one is taken depends on the processor
alone, so that a run that is resumed on its machine takes the same one. Other types, and GPUs, are torch's own affair.

A product of a few hundred rows, as decoding makes them, spends a tenth or more of its time on laying the weight out for
the processor's vectors; ``packed`` does that once for many products.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PACKED_BYTES = 1 << 31  # models whose linear layers take more are not laid out a second time

_LAID_OUT = "_rrhf_laid_out"  # the attribute in which a weight carries its copy laid out for oneDNN


@functools.cache
def onednn_is_faster() -> bool:
    """Whether fp32 products go to oneDNN here: AVX-512 on a processor that is not Intel's."""
    place = Path("/proc/cpuinfo")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    return place.exists() and "GenuineIntel" not in place.read_text() and _onednn_works()


def _onednn_works() -> bool:
    """Whether oneDNN's products are there and right; torch keeps these operations for its own compiler."""
    try:
        x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
        exact = x.t() @ x
        laid_out = torch.ops.mkldnn._reorder_linear_weight(x.t().contiguous(), 7)
        products = [
            _onednn(x.t(), x.t(), None),
            _onednn(x.t().contiguous(), laid_out, None),
            _onednn_sum(exact, x.t(), x) / 2,
        ]
        return all(torch.allclose(product, exact, atol=1e-5) for product in products)
    except (AttributeError, RuntimeError):
        return False


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", kind: str = "") -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], kind)
    return product


def _onednn_sum(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(a.contiguous(), c, b.t(), None, "add")
    return total


def _by_onednn(*tensors: Tensor | None) -> bool:
    """Whether a product of these goes to oneDNN."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() for t in given) and onednn_is_faster()


def _for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The weight as oneDNN is to have it, laid out where it was; None where torch makes the product."""
    laid_out: Tensor | None = getattr(weight, _LAID_OUT, None)
    if laid_out is not None and x.numel():
        return laid_out
    return weight if _by_onednn(x, weight, bias) else None


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a · b for matrices, without autograd."""
    if not _by_onednn(a, b):
        return torch.mm(a, b, out=out)
    # oneDNN reads a transposed second matrix as it lies; a transposed first one costs more than its copy.
    product = _onednn(a.contiguous(), b.t(), None)
    return product if out is None else out.copy_(product)


def addmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """c + a · b for matrices, without autograd."""
    return _onednn_sum(c, a, b) if _by_onednn(a, b, c) else torch.addmm(c, a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, as ``torch.nn.functional.linear``, but without autograd."""
    for_onednn = _for_onednn(x, weight, bias)
    return nn.functional.linear(x, weight, bias) if for_onednn is None else _onednn(x, for_onednn, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU(x · weightᵀ + bias), the exact one, without autograd; in one pass where oneDNN makes the product."""
    for_onednn = _for_onednn(x, weight, bias)
    if for_onednn is None:
        return nn.functional.gelu(nn.functional.linear(x, weight, bias))
    return _onednn(x, for_onednn, bias, "gelu", "none")


def linear_sum(c: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """c + x · weightᵀ for matrices, without autograd."""
    laid_out: Tensor | None = getattr(weight, _LAID_OUT, None)
    if laid_out is None or not x.numel():
        return torch.addmm(c, x, weight.t())
    total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, c, laid_out, None, "add")
    return total


def is_packed(weight: Tensor) -> bool:
    """Whether ``linear`` has this weight laid out."""
    return hasattr(weight, _LAID_OUT)


@contextlib.contextmanager
def packed(model: nn.Module, rows: int) -> Iterator[None]:
    """Lay the weights of ``model``'s linear layers out for products of about ``rows`` rows, while the context lasts.

    Nothing happens on a GPU, for types that oneDNN does not take here, and where the copies would be large. The weights
    must not change meanwhile.
    """
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    if not all(_packs(weight) and not is_packed(weight) for weight in weights):
        yield
        return
    if sum(weight.nbytes for weight in weights) > PACKED_BYTES:
        yield
        return
    try:
        for weight in weights:
            setattr(weight, _LAID_OUT, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows))
        yield
    finally:
        for weight in weights:
            vars(weight).pop(_LAID_OUT, None)


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or type(weight) is not nn.Parameter or not weight.is_contiguous():
        return False
    if weight.dtype == torch.bfloat16:
        return _bfloat16_works()
    return _by_onednn(weight)


@functools.cache
def _bfloat16_works() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _onednn_works()
    except (AttributeError, RuntimeError):
        return False


class Linear(torch.autograd.Function):
    """``linear`` with autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        outer = gradients[0].flatten(0, -2)
        return (
            matmul(outer, weight).view(*gradients[0].shape[:-1], -1) if ctx.needs_input_grad[0] else None,
            matmul(outer.t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None,
            outer.sum(dim=0) if ctx.needs_input_grad[2] else None,
        )
