"""Matrix products in fp32 on CPUs, by whichever of torch's two libraries is the faster there.

torch gives fp32 products to MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN, which torch has too,
uses their AVX-512 and is more than twice as fast (docs/benchmarks.md). Which one is taken depends on the processor
alone, so that a run that is resumed on its machine takes the same one. Other types, and GPUs, are torch's own affair.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@functools.cache
def onednn_is_faster() -> bool:
    """Whether fp32 products go to oneDNN here: AVX-512 on a processor that is not Intel's."""
    place = Path("/proc/cpuinfo")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    return place.exists() and "GenuineIntel" not in place.read_text() and _onednn_works()


def _onednn_works() -> bool:
    """Whether oneDNN's product is there and right; torch keeps the operation for its own compiler."""
    try:
        x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
        return torch.allclose(_onednn(x.t(), x.t(), None), x.t() @ x, atol=1e-5)
    except (AttributeError, RuntimeError):
        return False


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _taken(*tensors: Tensor | None) -> bool:
    given = [tensor for tensor in tensors if tensor is not None]
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() for t in given) and onednn_is_faster()


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a · b for matrices, without autograd."""
    if not _taken(a, b):
        return torch.mm(a, b, out=out)
    # oneDNN reads a transposed second matrix as it lies; a transposed first one costs more than its copy.
    found = _onednn(a.contiguous(), b.t(), None)
    return found if out is None else out.copy_(found)


def addmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """c + a · b for matrices, without autograd."""
    if not _taken(a, b, c):
        return torch.addmm(c, a, b)
    found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(a.contiguous(), c, b.t(), None, "add")
    return found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, as ``torch.nn.functional.linear``, but without autograd."""
    return _onednn(x, weight, bias) if _taken(x, weight, bias) else nn.functional.linear(x, weight, bias)


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
