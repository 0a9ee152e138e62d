"""Attention over trees on a CPU: every row against its query's keys in one product, every response against itself.

Nothing is computed that the tree mask hides between responses, the query's keys are read once for all of them, and
the heads of a group share keys as rows of one product. A row's softmax runs over two parts, the query's columns
(unpadded, a record at a time) and its own response's (responses of like length padded together), which meet in their
log-sum-exp. The backward pass makes the weights again from it (as FlashAttention, arXiv 2205.14135, does), so that
autograd keeps neither them nor the many small operations. Scores carry a factor log2 e, because 2^x is several times
as fast as e^x on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LIKE_LENGTH = 0.75  # responses at least this share of the longest of a group are padded to it


@dataclass(frozen=True)
class Rows:
    """Rows that see the same query: tokens [start, stop) of the row see tokens [start, start + query), the first
    ``query`` of them causally (``mask``: additive [query, query])."""

    start: int
    stop: int
    query: int
    mask: Tensor


@dataclass(frozen=True)
class Group:
    """Responses of like length in a grid [n, L].

    ``grid``: the token of each cell, [n · L] (any token for padding). ``cells``, ``tokens``: the cells that hold a
    token, and those tokens. ``padding``: the other cells. ``mask``: additive [L, L], hides what lies ahead, and with
    it the padding, from the cells that hold a token.
    """

    count: int
    grid: Tensor
    cells: Tensor
    tokens: Tensor
    padding: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Branches:
    """How the trees of one row are cut for attention."""

    records: tuple[Rows, ...]
    groups: tuple[Group, ...]


def branches(trees: Sequence[tuple[int, int, Sequence[int]]]) -> Branches:
    """Cut ``trees``, each (start, query length, input lengths ‖y_i‖ − 1 of its responses)."""
    records, spans = [], []
    for start, query, responses in trees:
        begin = start + query
        for size in responses:
            spans += [(size, begin)] * bool(size)
            begin += size
        records.append(Rows(start, begin, query, _causal(query)))
    groups: list[list[tuple[int, int]]] = []
    for span in sorted(spans, reverse=True):
        if groups and span[0] >= LIKE_LENGTH * groups[-1][0][0]:
            groups[-1].append(span)
        else:
            groups.append([span])
    return Branches(tuple(records), tuple(_group(group) for group in groups))


def _causal(size: int) -> Tensor:
    return torch.full((size, size), -torch.inf).triu_(1)


def _group(spans: list[tuple[int, int]]) -> Group:
    sizes, starts = torch.tensor(spans).unbind(1)
    column = torch.arange(int(sizes[0]))
    inside = column < sizes[:, None]
    grid = torch.where(inside, starts[:, None] + column, starts[:, None]).flatten()
    cells = inside.flatten().nonzero()[:, 0]
    padding = (~inside).flatten().nonzero()[:, 0]
    return Group(len(spans), grid, cells, grid[cells], padding, _causal(len(column)))


def branch_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Branches) -> Tensor:
    """softmax(scaling · q kᵀ) v where a row sees the query up to itself and, in its own response, what stands before.

    Args:
        query: Tensor of shape (1, H, T, D).
        key, value: Tensors of shape (1, H_kv, T, D); H is a multiple of H_kv (grouped queries).

    Returns:
        Tensor of shape (1, T, H, D).
    """
    found: Tensor = _BranchAttention.apply(query, key, value, scaling, layout)
    return found


class _BranchAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Branches) -> Tensor:
        q, k, v = _by_key_head(query, key.shape[1]), key[0].contiguous(), value[0].contiguous()
        heads, size = len(k), v.shape[-1]
        # log2 Σ 2^score of every row, and what its weights, not yet divided by their sum, make of the values
        partitions = torch.empty(*q.shape[:3], 1, dtype=_exact(q.dtype))
        output = torch.empty(*q.shape[:3], size, dtype=partitions.dtype)
        for rows in layout.records:
            found, partition = _softmax(_record_scores(rows, q, k, scaling), v[:, _seen(rows)])
            output[:, rows.start : rows.stop] = found.view(heads, -1, q.shape[2], size)
            partitions[:, rows.start : rows.stop] = partition.view(heads, -1, q.shape[2], 1)
        for group in layout.groups:
            found, partition = _softmax(_group_scores(group, q, k, scaling), _to_grid(group, v))
            first, second = partitions.index_select(1, group.tokens), _from_grid(group, partition, partitions)
            both = torch.logaddexp2(first, second)
            own = _from_grid(group, found, output).mul_(torch.exp2(second - both))
            own.addcmul_(output.index_select(1, group.tokens), torch.exp2(first - both))
            output.index_copy_(1, group.tokens, own)
            partitions.index_copy_(1, group.tokens, both)
        result = _by_token(output, query.shape[1]).to(q.dtype)
        ctx.save_for_backward(query, key, value, result, partitions)
        ctx.scaling, ctx.layout = scaling, layout
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, partitions = ctx.saved_tensors
        heads, scaling = key.shape[1], ctx.scaling
        q, k, v = _by_key_head(query, heads), key[0].contiguous(), value[0].contiguous()
        d_output = _by_key_head(gradients[0].transpose(1, 2), heads)
        # through the softmax: dS = P · (dP − Σ P dP), and Σ P dP = Σ_d O dO over both parts
        shift = (gradients[0] * result).sum(dim=-1, dtype=partitions.dtype)
        shift = shift[0].view(-1, heads, q.shape[2]).transpose(0, 1)[..., None]
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows in ctx.layout.records:
            seen, own, d_own = _seen(rows), _record(rows, q), _record(rows, d_output)
            weights = _record_scores(rows, q, k, scaling).sub_(_record(rows, partitions)).exp2_()
            d_scores = torch.bmm(d_own, v[:, seen].transpose(1, 2)).sub(_record(rows, shift)).mul_(weights).to(q.dtype)
            d_q[:, rows.start : rows.stop] = torch.bmm(d_scores, k[:, seen]).view(heads, -1, *q.shape[2:])
            d_k[:, seen] = torch.bmm(d_scores.transpose(1, 2), own)
            d_v[:, seen] = torch.bmm(weights.to(q.dtype).transpose(1, 2), d_own)
        for group in ctx.layout.groups:
            own, d_own = _to_grid(group, q), _to_grid(group, d_output)
            partition = partitions.index_select(1, group.grid).index_fill_(1, group.padding, torch.inf)
            partition = partition.view(len(own), -1, 1)
            weights = _group_scores(group, q, k, scaling).sub_(partition).exp2_()  # 0 in padding's rows
            d_weights = torch.bmm(d_own, _to_grid(group, v).transpose(1, 2))
            d_scores = d_weights.sub(_to_grid(group, shift)).mul_(weights).to(q.dtype)
            d_q.index_add_(1, group.tokens, _from_grid(group, torch.bmm(d_scores, _to_grid(group, k)), d_q))
            d_keys = torch.bmm(d_scores.transpose(1, 2), own)
            d_k.index_copy_(1, group.tokens, _from_grid(group, d_keys, d_k))
            d_values = torch.bmm(weights.to(q.dtype).transpose(1, 2), d_own)
            d_v.index_copy_(1, group.tokens, _from_grid(group, d_values, d_v))
        d_query = _by_token(d_q.mul_(scaling), query.shape[1]).transpose(1, 2)
        return d_query, d_k.mul_(scaling)[None], d_v[None], None, None


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _softmax(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """softmax2(scores) · values and log2 Σ 2^score; ``scores`` is used up."""
    highest = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(highest).exp2_()
    total = weights.sum(dim=-1, keepdim=True)
    output = torch.bmm(weights.to(values.dtype), values).to(total.dtype)
    return output.div_(total), total.log2_().add_(highest)


def _by_key_head(x: Tensor, heads: int) -> Tensor:
    """[1, H, T, D] as [H_kv, T, H / H_kv, D]: the rows of a token that share keys stand together."""
    return x[0].unflatten(0, (heads, -1)).transpose(1, 2).contiguous()


def _by_token(x: Tensor, heads: int) -> Tensor:
    """[H_kv, T, H / H_kv, D] as [1, T, H, D]."""
    return x.transpose(0, 1).reshape(1, x.shape[1], heads, -1)


def _seen(rows: Rows) -> slice:
    return slice(rows.start, rows.start + rows.query)


def _record(rows: Rows, x: Tensor) -> Tensor:
    """A record's rows of [H_kv, T, G, D], as [H_kv, t · G, D]."""
    return x[:, rows.start : rows.stop].flatten(1, 2)


def _to_grid(group: Group, x: Tensor) -> Tensor:
    """The group's rows of [H_kv, T, …, D], as [H_kv · n, L · …, D]."""
    return x.index_select(1, group.grid).view(len(x) * group.count, -1, x.shape[-1])


def _from_grid(group: Group, x: Tensor, like: Tensor) -> Tensor:
    """``_to_grid`` undone, without padding: [H_kv, tokens, …, D], shaped as ``like`` [H_kv, T, …, D]."""
    return x.view(len(like), len(group.grid), *like.shape[2:]).index_select(1, group.cells)


def _record_scores(rows: Rows, q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """log2 e · scaling · q kᵀ over the query's columns, in fp32 [H_kv, t · G, query]."""
    scores = torch.bmm(_record(rows, q), k[:, _seen(rows)].transpose(1, 2))
    scores = scores.to(_exact(q.dtype)).mul_(scaling * math.log2(math.e))
    scores[:, : rows.query * q.shape[2]].view(len(k), rows.query, q.shape[2], -1).add_(rows.mask[:, None])
    return scores


def _group_scores(group: Group, q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """log2 e · scaling · q kᵀ within responses, in fp32 [H_kv · n, L · G, L]."""
    scores = torch.bmm(_to_grid(group, q), _to_grid(group, k).transpose(1, 2))
    scores = scores.to(_exact(q.dtype)).mul_(scaling * math.log2(math.e))
    scores.view(len(scores), -1, q.shape[2], scores.shape[-1]).add_(group.mask[:, None])
    return scores
