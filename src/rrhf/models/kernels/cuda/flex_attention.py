"""Attention over trees by FlexAttention (arXiv 2412.05496): one kernel for the row, unread blocks left out.

    s_qk  = scaling · q_q · k_k,  with a soft cap c · tanh(s_qk / c)
    lse_q = log Σ_k e^(s_qk)
    o_q   = Σ_k e^(s_qk − lse_q) v_k        over the columns k with  k ≤ q < end[k]  and  pos_q − pos_k < window

A block of 128 × 128 scores is skipped where no row can read a column, taken without a mask where every row reads every
column, and masked inside the kernel elsewhere. Which block is which follows from the lengths of queries and
responses, on the host: with a_I the first and b_I the last row of block I, and M, m the largest and smallest of a
block, for a block of rows I and a block of columns J

    read by some     J < I and M(end_J) > a_I,  or J = I     (and m(pos_I) − M(pos_J) < window: never too few blocks)
    read by all      J < I and m(end_J) > b_I                (and M(pos_I) − m(pos_J) < window)

The row is padded to one of few lengths, because the kernel is compiled for a length; a padding row reads itself alone.

Shapes, in the names of this file:

    T, S         tokens of the row, and of the padded row
    n            S / 128, blocks
    H_kv, G      key heads, and query heads that share one (H = H_kv · G); keys and values are not copied for them
    query        [1, H, T, D];  key [1, H_kv, T, D];  value [1, H_kv, T, E], E may differ from D
    ends, pos    [S];  partial, full [n, n], bool: blocks read by some rows but not all, and by all
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from rrhf.models.kernels import reference
from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.transfer import on_device
from rrhf.models.trees import Tree

BLOCK = 128
FINE = 1024  # up to here a row is padded to a multiple of BLOCK, above it to one of four lengths an octave
COMPILED_SHAPES = 256  # lengths, windows, caps, types and head sizes of one process, with and without gradients

Mod = Callable[..., Tensor]
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]


def padded_length(tokens: int) -> int:
    """The length that a row of ``tokens`` is padded to."""
    step = BLOCK if tokens <= FINE else 1 << ((tokens - 1).bit_length() - 3)
    return -(-max(tokens, 1) // step) * step


@dataclass(frozen=True)
class Row:
    """Where the columns of a padded row stop being read, and at which positions they stand; both [S]."""

    ends: Ints
    positions: Ints


def padded_row(trees: Sequence[Tree]) -> Row:
    """``column_ends`` and positions of ``trees``, and of the padding behind them."""
    sizes, ends, firsts = [], [], []  # of each query and each response: tokens, where it ends to be read, position
    begin = 0
    for tree in trees:
        sizes += [tree.query, *tree.responses]
        firsts += [0, *[tree.query] * len(tree.responses)]
        ends.append(tree.start + tree.size)
        begin = tree.start + tree.query
        for size in tree.responses:
            begin += size
            ends.append(begin)
    tokens = sum(sizes)
    padding = np.arange(tokens, padded_length(tokens), dtype=np.int32)
    starts = np.cumsum([0, *sizes[:-1]])
    positions = np.arange(tokens) - np.repeat(starts - np.array(firsts), sizes)
    return Row(
        np.concatenate([np.repeat(ends, sizes), padding + 1]).astype(np.int32),
        np.concatenate([positions, np.zeros_like(padding)]).astype(np.int32),
    )


def blocks(row: Row, window: int | None) -> tuple[Bools, Bools]:
    """``partial`` and ``full``, as the head of this file says."""
    ends, positions = row.ends.reshape(-1, BLOCK), row.positions.reshape(-1, BLOCK)
    order = np.arange(len(ends))
    before = order[None, :] < order[:, None]
    some = before & (ends.max(1)[None, :] > BLOCK * order[:, None]) | np.eye(len(ends), dtype=bool)
    full = before & (ends.min(1)[None, :] >= BLOCK * (order[:, None] + 1))
    if window is not None:
        low, high = positions.min(1), positions.max(1)
        some &= low[:, None] - high[None, :] < window
        full &= high[:, None] - low[None, :] < window
    return some & ~full, full


def _listed(chosen: Bools) -> tuple[Ints, Ints]:
    """How many blocks each row of blocks has, [n], and which, first of all and in order, [n, n]."""
    return chosen.sum(1, dtype=np.int32), np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)


def _mask_mod(ends: Tensor, positions: Tensor, window: int | None) -> Mod:
    def in_tree(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[k])

    if window is None:
        return in_tree
    width = window

    def in_window(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[k]) & (positions[q] - positions[k] < width)

    return in_window


def block_mask(row: Row, window: int | None, device: torch.device) -> BlockMask:
    """The ``BlockMask`` of a row, by rows (``kv``) and, for the backward pass, by columns (``q``)."""
    partial, full = blocks(row, window)
    lists = [array for chosen in (partial, full, partial.T, full.T) for array in _listed(chosen)]
    ends, positions, *listed = on_device([row.ends, row.positions, *lists], device)
    kv, kv_index, full_kv, full_kv_index, q, q_index, full_q, full_q_index = (x[None, None] for x in listed)
    return BlockMask(
        seq_lengths=(len(row.ends), len(row.ends)),
        kv_num_blocks=kv,
        kv_indices=kv_index,
        full_kv_num_blocks=full_kv,
        full_kv_indices=full_kv_index,
        q_num_blocks=q,
        q_indices=q_index,
        full_q_num_blocks=full_q,
        full_q_indices=full_q_index,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_mask_mod(ends, positions, window),
    )


def _score_mod(softcap: float | None) -> Mod | None:
    if softcap is None:
        return None

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@functools.cache
def compiled(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """``flex_attention`` compiled for fixed shapes; beyond ``COMPILED_SHAPES`` of them it raises.

    Without compilation it would make whole score matrices.
    """
    compile: Any = torch.compile  # its overloads lack the two last options
    function: Callable[..., Any] = compile(
        flex_attention,
        backend=backend,
        dynamic=False,
        fullgraph=True,
        recompile_limit=COMPILED_SHAPES,
        isolate_recompiles=True,
    )
    return function


class FlexTrees:
    """Attention over trees by FlexAttention, compiled on CUDA and elsewhere (forward alone) not; results [1, T, H, E].

    All layers share a ``BlockMask`` a window. Dropout, which FlexAttention lacks, and chunks go to ``masked``.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        device: torch.device,
        masked: Callable[[AttentionCall], Tensor],
        attention: Callable[..., Any] | None = None,
    ) -> None:
        self.masked = masked
        self.attention: Callable[..., Any] = attention or (compiled() if device.type == "cuda" else flex_attention)
        self.device, self.row = device, padded_row(trees)
        self.tokens, self.reach = sum(tree.size for tree in trees), max((tree.reach for tree in trees), default=0)
        self.masks: dict[int | None, BlockMask] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        if call.dropout or (call.chunk is not None and self.reach > call.chunk):
            return self.masked(call)
        if call.sinks is None:
            return self._attend(call)[0]
        output, lse = self.with_lse(call)
        return reference.with_sinks(output, lse[..., None], call.sinks)

    def with_lse(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """The result, and each row's log Σ e^score, [1, T, H] in fp32 (fp64) with a graph.

        Raises:
            NotImplementedError: dropout.
        """
        if call.dropout:
            raise NotImplementedError("FlexAttention has no dropout")
        output, lse = self._attend(call, return_aux=AuxRequest(lse=True))
        return output, lse

    def _attend(self, call: AttentionCall, **options: Any) -> tuple[Tensor, Any]:
        spare = len(self.row.ends) - self.tokens
        tensors = [nn.functional.pad(x, (0, 0, 0, spare)) if spare else x for x in (call.query, call.key, call.value)]
        found = self.attention(
            *tensors,
            score_mod=_score_mod(call.softcap),
            block_mask=self.mask(call.window),
            scale=call.scaling,
            enable_gqa=call.query.shape[1] != call.key.shape[1],
            **options,
        )
        output, lse = (found[0], found[1].lse) if options else (found, None)
        output = output[:, :, : self.tokens].transpose(1, 2)
        return output, None if lse is None else lse[:, :, : self.tokens].transpose(1, 2)

    def mask(self, window: int | None) -> BlockMask:
        """The ``BlockMask`` of all layers with this window."""
        if window is not None and self.reach <= window:
            window = None
        if window not in self.masks:
            self.masks[window] = block_mask(self.row, window, self.device)
        return self.masks[window]


def tree_attention(trees: Sequence[Tree], ends: Tensor, positions: Tensor) -> FlexTrees:
    """``rrhf.models.kernels.choice.Kernels.tree_attention``; masked calls are the fall-back."""
    return FlexTrees(trees, ends.device, reference.tree_attention(trees, ends, positions))
