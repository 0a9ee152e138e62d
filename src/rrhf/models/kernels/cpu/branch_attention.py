"""Attention over trees on a CPU: every row against its query's keys in one product, every response against itself.

For row t of a record whose query has the columns X, in response i with the columns Y_i:

    s_tj = scaling · q_t · k_j                             for j ∈ X ∪ Y_i, j ≤ t
    o_t  = (Σ_{j∈X} e^(s_tj − m_t) v_j + Σ_{j∈Y_i} e^(s_tj − m_t) v_j) / z_t,   z_t the same sums without v
    m_t  = s_t1, the score with the record's first token, which every row sees; max_j s_tj in a row whose z_t overflows

and backwards, with P_tj = e^(s_tj − m_t) / z_t made again from m_t + log z_t (FlashAttention, arXiv 2205.14135):

    dv_j = Σ_t P_tj do_t,   ds_tj = P_tj (do_t · v_j − do_t · o_t),   dq_t = scaling Σ_j ds_tj k_j,   dk_j likewise

Both parts are taken relative to the same m_t, so that their sums simply add up. Nothing is computed that the tree
hides between responses, and autograd keeps neither weights nor the many small operations. Scores carry a factor
log2 e, because 2^x is several times as fast as e^x on a CPU.

Shapes, in the names of this file:

    T         tokens of the row, all records behind each other
    H_kv, G   key heads, and query heads that share one (H = H_kv · G)
    q         [H_kv, T, G, D]    queries: the G rows of a token that share keys stand together
    k, v      [H_kv, T, D]       keys (times scaling · log2 e), values
    record    t tokens, of which x are the query's: scores [H_kv, t · G, x]; unpadded, a record at a time
    group     n responses of like length, padded to L tokens: scores [H_kv · n, L · G, L]
    reference, partition         [H_kv, T, G, 1]: m_t, and m_t + log z_t, both in units of log 2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rrhf.models.trees import Tree

SPARE_CELLS = 1 << 14  # scores a head that padding may add to a group before another group is cheaper
HIGHEST_SUM = 2.0**100  # of weights relative to the first token's; above it the output's sums might overflow


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

    ``grid``: the token of each cell, [n · L] (any token for padding). ``padding``: the cells that hold none. ``mask``:
    additive [L, L], hides what lies ahead, and with it the padding, from the cells that hold a token.
    """

    count: int
    grid: Tensor
    padding: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Branches:
    """How the trees of one row are cut for attention.

    ``cells``: [T], where each token stands among the cells of all groups, one group behind the other; a query's tokens
    at the cell behind the last. ``keys``: [T], where it stands among the queries' tokens of all records and behind
    them those cells.
    """

    records: tuple[Rows, ...]
    groups: tuple[Group, ...]
    cells: Tensor
    keys: Tensor


def branches(trees: Sequence[Tree]) -> Branches:
    """Cut ``trees`` for attention."""
    records, spans = [], []
    for tree in trees:
        begin = tree.start + tree.query
        for size in tree.responses:
            spans += [(size, begin)] * bool(size)
            begin += size
        records.append(Rows(tree.start, begin, tree.query, _causal(tree.query)))
    groups: list[list[tuple[int, int]]] = []
    spare = 0
    for span in sorted(spans, reverse=True):
        spare += groups[-1][0][0] ** 2 - span[0] ** 2 if groups else 0
        if groups and spare <= SPARE_CELLS:
            groups[-1].append(span)
        else:
            groups.append([span])
            spare = 0
    cut = tuple(_group(group) for group in groups)
    return Branches(tuple(records), cut, *_places(records, cut))


def _causal(size: int) -> Tensor:
    return torch.full((size, size), -torch.inf).triu_(1)


def _group(spans: list[tuple[int, int]]) -> Group:
    sizes, starts = torch.tensor(spans).unbind(1)
    column = torch.arange(int(sizes[0]))
    inside = column < sizes[:, None]
    grid = torch.where(inside, starts[:, None] + column, starts[:, None]).flatten()
    return Group(len(spans), grid, (~inside).flatten().nonzero()[:, 0], _causal(len(column)))


def _places(records: Sequence[Rows], groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """``Branches.cells`` and ``Branches.keys``."""
    last = sum(len(group.grid) for group in groups)
    cells = torch.full((records[-1].stop,), last)
    first = 0
    for group in groups:
        here = torch.arange(first, first + len(group.grid))
        real = torch.ones(len(here), dtype=torch.bool).index_fill_(0, group.padding, False)
        cells[group.grid[real]] = here[real]
        first += len(here)
    queries = torch.cat([torch.arange(rows.start, rows.start + rows.query) for rows in records])
    keys = cells + len(queries)
    keys[queries] = torch.arange(len(queries))
    return cells, keys


def branch_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Branches) -> Tensor:
    """softmax(scaling · q kᵀ) v where a row sees the query up to itself and, in its own response, what stands before.

    Args:
        query: Tensor of shape (1, H, T, D).
        key, value: Tensors of shape (1, H_kv, T, D); H is a multiple of H_kv (grouped queries).

    Returns:
        Tensor of shape (1, T, H, D).
    """
    output: Tensor = _BranchAttention.apply(query, key, value, scaling, layout, False)[0]
    return output


def branch_attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Branches
) -> tuple[Tensor, Tensor]:
    """``branch_attention`` and log Σ_j e^(score_tj), in fp32 (fp64), Tensor of shape (1, T, H, 1)."""
    output, lse = _BranchAttention.apply(query, key, value, scaling, layout, True)
    return output, lse


class _BranchAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Branches, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = _by_key_head(query, key.shape[1]), key[0] * (scaling * math.log2(math.e)), value[0].contiguous()
        reference = _first_scores(layout, q, k)
        output, total = _weighed(layout, q, k, v, reference)
        finite = total < HIGHEST_SUM  # false for NaN
        if not bool(finite.all()):  # only those rows get another: no row's numbers depend on what it does not see
            reference = torch.where(finite, reference, _highest_scores(layout, q, k))
            output, total = _weighed(layout, q, k, v, reference)
        result = _by_token(output.to(total.dtype).div_(total), query.dtype)
        partition = total.log2_().add_(reference)
        ctx.save_for_backward(query, key, value, result, partition)
        ctx.scaling, ctx.layout = scaling, layout
        return result, _by_token(partition * math.log(2), partition.dtype) if with_lse else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, partition = ctx.saved_tensors
        heads, layout = key.shape[1], ctx.layout
        q, k, v = _by_key_head(query, heads), key[0] * (ctx.scaling * math.log2(math.e)), value[0].contiguous()
        d_output, scaled = _by_key_head(gradients[0].transpose(1, 2), heads), key[0] * ctx.scaling
        # through the softmax: dS = P · (dP − Σ P dP), and Σ P dP = Σ_d O dO over both parts
        shift = (gradients[0] * result).sum(dim=-1, dtype=partition.dtype)
        if gradients[1] is not None:  # ∂ log z_t / ∂ s_tj = P_tj
            shift = shift - gradients[1][..., 0]
        shift = shift[0].view(-1, heads, q.shape[2]).transpose(0, 1)[..., None].contiguous()
        parts: list[tuple[Tensor, ...]] = []
        for rows in layout.records:
            seen, own, d_own = _seen(rows), _record(rows, q), _record(rows, d_output)
            weights = _record_weights(rows, q, k, partition)
            parts.append(_gradients(weights, own, scaled[:, seen], v[:, seen], d_own, _record(rows, shift)))
        for group in layout.groups:
            own, d_own, keys, values, shifts = (_to_grid(group, x) for x in (q, d_output, scaled, v, shift))
            weights = _group_weights(group, q, k, partition)
            parts.append(_gradients(weights, own, keys, values, d_own, shifts))
        d_queries, d_keys, d_values = zip(*parts, strict=True)
        d_query = _added(layout, d_queries, q.shape)
        d_key = _joined(len(k), k.shape[-1], d_keys).index_select(1, layout.keys).mul_(ctx.scaling)
        d_value = _joined(len(v), v.shape[-1], d_values).index_select(1, layout.keys)
        return _by_token(d_query, query.dtype).transpose(1, 2), d_key[None], d_value[None], None, None, None


def _weighed(layout: Branches, q: Tensor, k: Tensor, v: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Σ 2^(score − reference) · value over a row's columns [H_kv, T, G, D], and the same sum without the values."""
    outputs, totals = [], []
    for rows in layout.records:
        weights = _record_weights(rows, q, k, reference)
        outputs.append(torch.bmm(weights.to(v.dtype), v[:, _seen(rows)]))
        totals.append(weights.sum(dim=-1, keepdim=True))
    for group in layout.groups:
        weights = _group_weights(group, q, k, reference)
        outputs.append(torch.bmm(weights.to(v.dtype), _to_grid(group, v)))
        totals.append(weights.sum(dim=-1, keepdim=True))
    return _added(layout, outputs, (*q.shape[:3], v.shape[-1])), _added(layout, totals, (*q.shape[:3], 1))


def _first_scores(layout: Branches, q: Tensor, k: Tensor) -> Tensor:
    """Every row's score with its record's first token, [H_kv, T, G, 1]."""
    scores = [_scores(_record(rows, q), k[:, rows.start : rows.start + 1]) for rows in layout.records]
    return torch.cat(scores, dim=1).view(*q.shape[:3], 1)


def _highest_scores(layout: Branches, q: Tensor, k: Tensor) -> Tensor:
    """Every row's highest score, [H_kv, T, G, 1]."""
    nothing = torch.zeros(*q.shape[:3], 1, dtype=_exact(q.dtype))
    highest = [_record_scores(rows, q, k, nothing).amax(dim=-1, keepdim=True) for rows in layout.records]
    within = [_group_scores(group, q, k, nothing).amax(dim=-1, keepdim=True) for group in layout.groups]
    over_query = torch.cat(highest, dim=1).view_as(nothing)
    if not within:
        return over_query
    return torch.maximum(over_query, _placed(layout, within, nothing.shape, -torch.inf))


def _gradients(
    weights: Tensor, queries: Tensor, keys: Tensor, values: Tensor, d_output: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys (but for the scaling, which ``keys`` have) and values of one block of weights."""
    d_scores = torch.bmm(d_output, values.transpose(1, 2)).to(weights.dtype)
    d_scores = d_scores.sub_(shift).mul_(weights).to(keys.dtype)
    d_keys = torch.bmm(d_scores.transpose(1, 2), queries)
    return torch.bmm(d_scores, keys), d_keys, torch.bmm(weights.to(keys.dtype).transpose(1, 2), d_output)


def _record_weights(rows: Rows, q: Tensor, k: Tensor, partition: Tensor) -> Tensor:
    """2^(score − partition) over the query's columns, in fp32 (fp64) [H_kv, t · G, query]."""
    return _record_scores(rows, q, k, partition).exp2_()


def _record_scores(rows: Rows, q: Tensor, k: Tensor, partition: Tensor) -> Tensor:
    scores = _scores(_record(rows, q), k[:, _seen(rows)]).sub_(_record(rows, partition))
    scores[:, : rows.query * q.shape[2]] += rows.mask.repeat_interleave(q.shape[2], dim=0)
    return scores


def _group_weights(group: Group, q: Tensor, k: Tensor, partition: Tensor) -> Tensor:
    """2^(score − partition) within responses, in fp32 (fp64) [H_kv · n, L · G, L]; 0 in padding's rows."""
    return _group_scores(group, q, k, partition).exp2_()


def _group_scores(group: Group, q: Tensor, k: Tensor, partition: Tensor) -> Tensor:
    own = partition.index_select(1, group.grid).index_fill_(1, group.padding, torch.inf)
    scores = _scores(_to_grid(group, q), _to_grid(group, k)).sub_(own.view(len(k) * group.count, -1, 1))
    return scores.add_(group.mask.repeat_interleave(q.shape[2], dim=0))


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.bmm(queries, keys.transpose(1, 2)).to(_exact(queries.dtype))


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _by_key_head(x: Tensor, heads: int) -> Tensor:
    """[1, H, T, D] as [H_kv, T, H / H_kv, D]: the rows of a token that share keys stand together."""
    return x[0].unflatten(0, (heads, -1)).transpose(1, 2).contiguous()


def _by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[H_kv, T, H / H_kv, D] as [1, T, H, D] of another type."""
    result = torch.empty(x.shape[1], x.shape[0], *x.shape[2:], dtype=dtype, device=x.device)
    return result.copy_(x.transpose(0, 1)).flatten(1, 2)[None]


def _seen(rows: Rows) -> slice:
    return slice(rows.start, rows.start + rows.query)


def _record(rows: Rows, x: Tensor) -> Tensor:
    """A record's rows of [H_kv, T, G, D], as [H_kv, t · G, D]."""
    return x[:, rows.start : rows.stop].flatten(1, 2)


def _to_grid(group: Group, x: Tensor) -> Tensor:
    """The group's rows of [H_kv, T, …, D], as [H_kv · n, L · …, D]."""
    return x.index_select(1, group.grid).view(len(x) * group.count, -1, x.shape[-1])


def _joined(heads: int, width: int, parts: Sequence[Tensor]) -> Tensor:
    """Records' and groups' rows [·, ·, D] one behind the other, [H_kv, rows, width]."""
    return torch.cat([part.view(heads, -1, width) for part in parts], dim=1)


def _placed(layout: Branches, parts: Sequence[Tensor], shape: Sequence[int], nothing: float) -> Tensor:
    """Groups' cells [H_kv · n, L · G, D] brought to their tokens [H_kv, T, G, D]; ``nothing`` for queries' tokens."""
    heads, width = shape[0], shape[2] * shape[3]
    beyond = parts[0].new_full((heads, 1, width), nothing)
    return _joined(heads, width, [*parts, beyond]).index_select(1, layout.cells).view(shape)


def _added(layout: Branches, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The records' rows, and to them the groups', [H_kv, T, G, D]."""
    records, groups = parts[: len(layout.records)], parts[len(layout.records) :]
    total = torch.cat(list(records), dim=1).view(shape)
    return total.add_(_placed(layout, groups, shape, 0.0)) if groups else total
