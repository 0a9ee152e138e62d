"""Logits on a CPU: tiles that stay in its caches, e^x by 2^x, the best tokens looked for in blocks.

Products of bfloat16 are summed in fp32 and then rounded to 8 bits: nine rows in ten of logits have equal ones at a
top-50 cut. ``logits`` makes what was rounded off by a second product, Δ = x · Wᵀ − bf16(x · Wᵀ), whose own rounding is
2⁻⁹ of that: 17 bits for two products in bfloat16, where one in fp32 takes as long as seven.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rrhf.models.kernels import reference
from rrhf.models.kernels.cpu import products

LOGIT_ELEMENTS = 1 << 20  # logits that exist at a time: a tile should stay in the processor's caches
LOGIT_ROWS = 2048  # tokens that share one pass over the output layer's weights
EVEN_ROWS = 16  # products of 779 rows take up to a quarter longer than those of 784
SAMPLING_ROWS = 16  # rows whose [rows, vocabulary] temporaries stay in the caches
NUCLEUS = 1024  # likeliest tokens among which a nucleus is looked for before the whole vocabulary is sorted
TOP_BLOCK = 256  # tokens whose highest score is looked at before the tokens themselves
LOG2_E = math.log2(math.e)


def logit_tiles(rows: int, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    return reference.tiles(rows, vocabulary, LOGIT_ROWS, LOGIT_ELEMENTS)


def logit_rows(vocabulary: int) -> int:
    return max(1, 4 * LOGIT_ELEMENTS // vocabulary)


def sampling_rows(vocabulary: int) -> int:
    return SAMPLING_ROWS


def nucleus(vocabulary: int) -> int:
    return NUCLEUS


def logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dtype != torch.bfloat16 or not _rest_is_exact():
        return products.linear(x, weight, bias)
    rounded = products.linear(x, weight)
    total = rounded.float().add_(products.linear_sum(rounded.neg_(), x, weight))
    return total if bias is None else total.add_(bias)


@functools.cache
def _rest_is_exact() -> bool:
    """Whether a sum with a product is rounded once, at its end, as ``logits`` needs it."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(32, 64, generator=generator).bfloat16() for _ in range(2))
    rounded = products.linear(x, weight)
    total = rounded.double() + products.linear_sum(-rounded, x, weight).double()
    return bool((total - x.double() @ weight.double().t()).abs().max() < 2.0**-14 * rounded.abs().max())


def spare_rows(rows: int) -> int:
    return -rows % EVEN_ROWS


def exp_(x: Tensor) -> Tensor:
    """e^x in place by 2^x, which is several times as fast."""
    return x.mul_(LOG2_E).exp2_()


def exp_less_(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(y * -LOG2_E, x, alpha=LOG2_E, out=x).exp2_()


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest are in the ``count`` blocks with the largest maxima, of equal ones in the first."""
    rows, vocabulary = scores.shape
    if vocabulary % TOP_BLOCK or count * TOP_BLOCK >= vocabulary:
        return _top(scores, count)
    blocks = scores.view(rows, -1, TOP_BLOCK)
    best = reference.top(blocks.amax(dim=-1), count)[1].sort(dim=-1).values
    inside = blocks.gather(1, best[:, :, None].expand(-1, -1, TOP_BLOCK)).flatten(1)
    values, columns = _top(inside, count)
    return values, best.gather(1, columns // TOP_BLOCK) * TOP_BLOCK + columns % TOP_BLOCK


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``torch.topk``, then equals put in order, and rows with equals on both sides of the cut done again."""
    columns = torch.topk(scores, count, dim=-1).indices.sort(dim=-1).values
    values, order = scores.gather(1, columns).sort(dim=-1, descending=True, stable=True)
    columns = columns.gather(1, order)
    tied = (scores >= values[:, -1:]).sum(dim=-1) > count
    if bool(tied.any()):
        values[tied], columns[tied] = reference.top(scores[tied], count)
    return values, columns
