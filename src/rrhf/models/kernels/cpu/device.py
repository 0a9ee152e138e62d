"""A CPU's kernels, as ``rrhf.models.kernels.choice.Kernels`` lists them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rrhf.models.kernels import reference
from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.cpu import products
from rrhf.models.kernels.cpu.blocked_cache import BlockedCache
from rrhf.models.kernels.cpu.branch_attention import (
    Branches,
    branch_attention,
    branch_attention_with_lse,
    branches,
)
from rrhf.models.kernels.cpu.lean_modules import lean
from rrhf.models.kernels.cpu.logits import (
    exp_,
    exp_less_,
    logit_rows,
    logit_tiles,
    logits,
    nucleus,
    sampling_rows,
    spare_rows,
    top,
)
from rrhf.models.kernels.cpu.products import addmm, linear, matmul
from rrhf.models.kernels.key_cache import KeyCache
from rrhf.models.kernels.reference import fp64_device
from rrhf.models.trees import Tree

__all__ = [
    "addmm",
    "exp_",
    "exp_less_",
    "fp64_device",
    "key_cache",
    "lanes",
    "lean",
    "linear",
    "logit_rows",
    "logit_tiles",
    "logits",
    "masked_attention",
    "matmul",
    "most_queries",
    "nucleus",
    "packed",
    "sampling_rows",
    "spare_rows",
    "steps_between_checks",
    "top",
    "tree_attention",
]

MOST_QUERIES = 64  # with four responses each, products of half of them are as fast as they get
LANE_ROWS = 32  # of a lane of a batch, decoded beside others
PACK_ROWS, PACK_STEPS = 32, 32  # from so many rows a step and steps on, laying weights out anew pays


def products_beat_fused(dtype: torch.dtype) -> bool:
    """In bfloat16 torch's fused attention takes twice as long as plain products do, its backward 2-3 times."""
    return dtype == torch.bfloat16


def lanes(rows: int) -> int:
    """A thread a lane, as long as its products have rows enough to be fast."""
    return max(1, min(torch.get_num_threads(), rows // LANE_ROWS))


def most_queries() -> int:
    return MOST_QUERIES


def steps_between_checks() -> int:
    """Nothing waits for anything here: rows that have ended are dropped at once."""
    return 1


def packed(model: nn.Module, rows: int, steps: int) -> contextlib.AbstractContextManager[None]:
    if rows < PACK_ROWS or steps < PACK_STEPS:
        return contextlib.nullcontext()
    return products.packed(model, rows)


def masked_attention(call: AttentionCall, mask: Tensor) -> Tensor:
    if products_beat_fused(call.query.dtype):
        return reference.product_attention(call, mask)
    return reference.masked_attention(call, mask)


class _BranchedTrees:
    """Attention over trees by branches; by one masked call a tree where scores are capped, dropped or slide."""

    def __init__(self, trees: Sequence[Tree], ends: Tensor, positions: Tensor) -> None:
        self.trees = trees
        self.masked = reference.MaskedTrees(trees, ends, positions, masked_attention)
        self.branches: Branches | None = None

    def __call__(self, call: AttentionCall) -> Tensor:
        hidden = call.hides(max(tree.reach for tree in self.trees))
        if hidden or call.softcap is not None or call.dropout:
            return self.masked(call)
        if self.branches is None:
            self.branches = branches(self.trees)
        if call.sinks is not None:
            output, lse = branch_attention_with_lse(call.query, call.key, call.value, call.scaling, self.branches)
            return reference.with_sinks(output, lse, call.sinks)
        return branch_attention(call.query, call.key, call.value, call.scaling, self.branches)


def tree_attention(trees: Sequence[Tree], ends: Tensor, positions: Tensor) -> Callable[[AttentionCall], Tensor]:
    return _BranchedTrees(trees, ends, positions)


def key_cache(key: Tensor, value: Tensor, count: int, prompt: int, width: int, columns: int) -> KeyCache:
    if products_beat_fused(key.dtype):
        return BlockedCache(key, value, count, prompt, width, columns)
    return reference.WholeCache(key, value, count, columns, masked_attention)
