"""The kernels in plain torch, for every device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.key_cache import KeyBlock, KeyCache
from rrhf.models.trees import Tree, visible

LOGIT_ELEMENTS = 1 << 25  # logits that exist at a time: few, large products
LOGIT_ROWS = 2048  # tokens that share one pass over the output layer's weights
MOST_QUERIES = 128  # decoded together: a part of a sampling run holds no more
READ_COLUMNS = 64  # of a decode cache, read together: steps of the same shapes, and rows of masks that lie aligned
STEPS_BETWEEN_CHECKS = 16  # a look at the device's numbers waits for all its work
WITHOUT_FP64 = frozenset({"mps"})  # device types that have no fp64
HALVES = (torch.bfloat16, torch.float16)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mm(a, b, out=out)


def addmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(c, a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def lean(model: nn.Module) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


def packed(model: nn.Module, rows: int, steps: int) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


# -- attention


def masked_attention(call: AttentionCall, mask: Tensor) -> Tensor:
    """torch's fused kernel, which knows no soft cap and no sinks: with them, ``product_attention``."""
    if call.softcap is not None or call.sinks is not None:
        return product_attention(call, mask)
    key, value = call.key, call.value
    groups = call.query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return nn.functional.scaled_dot_product_attention(
        call.query, key, value, attn_mask=mask, dropout_p=call.dropout, scale=call.scaling
    )


def product_attention(call: AttentionCall, mask: Tensor) -> Tensor:
    """``masked_attention`` by two products and a softmax in fp32."""
    batch, heads, length, size = call.query.shape
    groups, columns = heads // call.key.shape[1], call.key.shape[2]
    # The heads of a group share keys: their rows stand below each other in one product.
    rows = call.query.reshape(batch * call.key.shape[1], groups * length, size)
    keys, values = call.key.flatten(0, 1), call.value.flatten(0, 1)
    weights = torch.bmm(rows, keys.transpose(1, 2)).float().view(batch, -1, groups, length, columns) * call.scaling
    if call.softcap is not None:
        weights = call.softcap * torch.tanh(weights / call.softcap)
    scores = weights + (mask if mask.dim() == 2 else mask[:, :, None])
    weights = nn.functional.dropout(torch.softmax(scores, dim=-1).to(call.query.dtype), call.dropout)
    output = torch.bmm(weights.view(len(rows), groups * length, columns), values).view(batch, heads, length, -1)
    if call.sinks is None:
        return output
    return with_sinks(output, scores.logsumexp(dim=-1).view(batch, heads, length, 1), call.sinks[..., None])


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention as if its softmax had one more score, the head's sink, that has no value (GPT-OSS).

    Σ_j e^(s_j) v_j / (e^sink + Σ_j e^(s_j)) = σ(lse − sink) · output, with lse = log Σ_j e^(s_j).

    Args:
        output: what attention gives without it, a row of D numbers for each query and head.
        lse: Tensor of ``output``'s shape but for 1 in place of D.
        sinks: Tensor that broadcasts to ``lse``.
    """
    return output * torch.sigmoid(lse - sinks).to(output.dtype)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as one to add to scores."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


class MaskedTrees:
    """Attention over trees by one masked call a tree: few launches, and all that attention can ask for."""

    def __init__(
        self,
        trees: Sequence[Tree],
        ends: Tensor,
        positions: Tensor,
        attention: Callable[[AttentionCall, Tensor], Tensor],
    ) -> None:
        self.trees, self.ends, self.positions, self.attention = trees, ends, positions, attention
        self.masks: dict[tuple[Tree, int | None, int | None, torch.dtype], Tensor] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        # split, not slices: its backward is one concatenation instead of a zeroed row a tree
        sizes = [tree.size for tree in self.trees]
        pieces = zip(*(x.split(sizes, dim=2) for x in (call.query, call.key, call.value)), strict=True)
        outputs = [
            self.attention(call.over(*piece), self.mask(tree, call))
            for tree, piece in zip(self.trees, pieces, strict=True)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()

    def mask(self, tree: Tree, call: AttentionCall) -> Tensor:
        """The additive mask [t, t] of one tree; the same for all layers of a kind."""
        dtype = call.query.dtype
        window, chunk = (call.window, call.chunk) if call.hides(tree.reach) else (None, None)
        mask = self.masks.get((tree, window, chunk, dtype))
        if mask is None:
            here = slice(tree.start, tree.start + tree.size)
            positions = self.positions[here]
            seen = visible(self.ends[here] - tree.start, positions, window)
            if chunk is not None:
                seen &= positions[:, None] // chunk == positions // chunk
            mask = additive(seen, dtype)
            self.masks[tree, window, chunk, dtype] = mask
        return mask


def tree_attention(trees: Sequence[Tree], ends: Tensor, positions: Tensor) -> MaskedTrees:
    return MaskedTrees(trees, ends, positions, masked_attention)


# -- the cache of a decode loop


class WholeCache:
    """A ``KeyCache`` of one block with all columns, of which ``attention`` reads multiples of ``read``."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        count: int,
        columns: int,
        attention: Callable[[AttentionCall, Tensor], Tensor],
        read: int = 1,
    ) -> None:
        keys, values = (x.new_zeros(count, x.shape[1], columns, x.shape[-1]) for x in (key, value))
        self.whole = KeyBlock(0, keys, values)
        self.attention, self.read = attention, read

    def block(self, column: int) -> KeyBlock:
        return self.whole

    def columns_read(self, end: int) -> int:
        return min(end + -end % self.read, self.whole.end)

    def mask_type(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def attend(self, call: AttentionCall, queries: Tensor, mask: Tensor) -> Tensor:
        end = mask.shape[-1]
        return self.attention(call.over(queries, self.whole.keys[:, :, :end], self.whole.values[:, :, :end]), mask)

    def select(self, rows: Tensor) -> None:
        self.whole.keys, self.whole.values = self.whole.keys[rows], self.whole.values[rows]


def key_cache(key: Tensor, value: Tensor, count: int, prompt: int, width: int, columns: int) -> KeyCache:
    return WholeCache(key, value, count, columns, masked_attention, READ_COLUMNS)


# -- the output layer and what is drawn from it


def logit_tiles(rows: int, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    return tiles(rows, vocabulary, LOGIT_ROWS, LOGIT_ELEMENTS)


def tiles(rows: int, columns: int, most_rows: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Tiles of at most ``most_rows`` rows and about ``elements`` elements, the rows' columns in order."""
    for top in range(0, rows, most_rows):
        bottom = min(top + most_rows, rows)
        size = max(1, elements // (bottom - top))
        size -= size % 256 if size > 256 else 0  # matrix products like round sizes
        for left in range(0, columns, size):
            yield slice(top, bottom), slice(left, min(left + size, columns))


def logit_rows(vocabulary: int) -> int:
    return max(1, 4 * LOGIT_ELEMENTS // vocabulary)


def sampling_rows(vocabulary: int) -> int:
    return max(1, LOGIT_ELEMENTS // vocabulary)


def spare_rows(rows: int) -> int:
    return 0


def exp_(x: Tensor) -> Tensor:
    return x.exp_()


def exp_less_(x: Tensor, y: Tensor) -> Tensor:
    return x.sub_(y).exp_()


def logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Products that are summed in fp32 and stay so, where torch has them for the device (CUDA; not run on one yet)."""
    if x.dtype in HALVES and _sums_stay_in_fp32(x.device.type):
        product = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return product if bias is None else product.add_(bias)
    return nn.functional.linear(x, weight, bias)


@functools.cache
def _sums_stay_in_fp32(device: str) -> bool:
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        return torch.mm(ones, ones, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False


def fp64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type in WITHOUT_FP64 else device


def steps_between_checks() -> int:
    return STEPS_BETWEEN_CHECKS


def lanes(rows: int) -> int:
    return 1


def most_queries() -> int:
    return MOST_QUERIES


def nucleus(vocabulary: int) -> int:
    return vocabulary


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``torch.topk`` says nothing about equals: here no two numbers that it sees are equal.

    A score's bits, read as an integer of the same order, stand above the bits of its column, counted from the end.
    """
    if scores.dtype != torch.float32:
        values, columns = torch.sort(scores, dim=-1, descending=True, stable=True)
        return values[:, :count], columns[:, :count]
    bits = (scores + 0.0).view(torch.int32)  # −0 is 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = scores.shape[-1] - 1
    keys = (ordered.long() << 32) | torch.arange(last, -1, -1, device=scores.device)
    columns = last - (torch.topk(keys, count, dim=-1).values & 0xFFFFFFFF)
    return scores.gather(1, columns), columns
