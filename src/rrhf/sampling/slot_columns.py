"""Decoding long independent responses: a response reads its query's columns and its own, not its neighbours'.

``SharedCache`` lets beams change places, so each of k slots reads all k responses' columns, most of them masked. Draws
never change places: here their keys lie apart. In the names of this file, for slot w of query n at step s:

    o = Σ_{c < P} a_c v_nc + Σ_{j ≤ s} b_j v_nwj,    (a, b) = softmax over both of scaling · q_nw · (k_nc, k_nwj)

    N, W      queries in the buffers, slots of each
    H_kv, G   key heads, and query heads that share one
    P, S      columns of the longest query, and of the responses' blocks so far
    queries   [N, W, H_kv, G, D];  a query's keys [N, H_kv, P, D];  a block of responses' keys [N · W, H_kv, BLOCK, D]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.key_cache import KeyBlock
from rrhf.models.kernels.reference import additive, with_sinks
from rrhf.models.logprobs import output_logits
from rrhf.sampling.shared_cache import SharedCache
from rrhf.sampling.stepping import Advance

BLOCK = 256  # steps of a block; its columns ahead of the present step are read too, and masked


class SlotColumns:
    """The stepper on our attention for policies whose slots continue themselves, and the ``Layout`` of its calls."""

    def __init__(self, model: PreTrainedModel, queries: Sequence[list[int]], width: int, max_new_tokens: int) -> None:
        self.prompt = SharedCache(model, queries, width, max_new_tokens=1)  # the queries' columns alone
        self.finite = self.prompt.finite
        self.width, self.most = width, max_new_tokens - 1
        self.blocks: dict[int, list[KeyBlock]] = {}
        self.position_ids: Tensor  # of the forward pass at hand
        self.step_index = 0

    def prefill(self) -> Tensor:
        return self.prompt.prefill()

    def step(self, advance: Advance) -> Tensor:
        prompt, query = self.prompt, advance.slots // self.width
        rows = prompt.compact(query)
        if rows is not None:
            for block in (block for blocks in self.blocks.values() for block in blocks):
                block.keys, block.values = self._select(block.keys, rows), self._select(block.values, rows)
        self._row, self._slot = prompt.place[query], advance.slots % self.width
        self._all = len(query) == len(prompt.visible) * self.width  # all slots live, in order: plain views
        self._masks: dict[tuple[int | None, int | None, torch.dtype, int], Tensor] = {}
        self._lengths = prompt.lengths.new_zeros(len(prompt.visible))
        self._lengths[self._row] = prompt.lengths[query]
        hidden = prompt.forward(advance.tokens, prompt.lengths[query] + self.step_index, self)
        self.step_index += 1
        self.finite.add(hidden)
        return output_logits(prompt.model, hidden)

    def _select(self, x: Tensor, rows: Tensor) -> Tensor:
        """The slots of these queries; keys stay as they lie, [N · W, H_kv, D, BLOCK]."""
        kept = x.transpose(2, 3).unflatten(0, (-1, self.width))[rows].flatten(0, 1)
        return kept.transpose(2, 3)

    def attend(self, layer: int, call: AttentionCall) -> Tensor:
        blocks = self._blocks(layer, call)
        place = self._row * self.width + self._slot
        column = self.step_index - blocks[-1].start
        blocks[-1].keys[place, :, column] = call.key[0].transpose(0, 1)
        blocks[-1].values[place, :, column] = call.value[0].transpose(0, 1)
        heads = call.key.shape[1]
        queries = self._grid(call.query[0].unflatten(0, (heads, -1)).permute(2, 0, 1, 3))
        output = self._weighted(call, queries, self.prompt.layers[layer].block(0), blocks).flatten(2, 3)
        return output.flatten(0, 1)[None] if self._all else output[self._row, self._slot][None]

    def _grid(self, x: Tensor) -> Tensor:
        """[R, …] of the live slots as [N, W, …]; zeros for the others."""
        if self._all:
            return x.unflatten(0, (-1, self.width))
        grid = x.new_zeros(len(self.prompt.visible), self.width, *x.shape[1:])
        grid[self._row, self._slot] = x
        return grid

    def _weighted(self, call: AttentionCall, queries: Tensor, query: KeyBlock, blocks: list[KeyBlock]) -> Tensor:
        """The attention of ``queries`` [N, W, H_kv, G, D] over their query's block and their own; the same shape."""
        count, width, _, groups, _ = queries.shape
        together = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)  # the slots' rows of a query in one product
        apart = queries.flatten(0, 1)
        shared = torch.matmul(together, query.keys.transpose(2, 3)).unflatten(2, (groups, width))
        scores = [shared.permute(0, 3, 1, 2, 4)]
        scores += [torch.matmul(apart, b.keys.transpose(2, 3)).unflatten(0, (count, width)) for b in blocks]
        exact = torch.float64 if queries.dtype == torch.float64 else torch.float32
        whole = torch.cat([part.to(exact) for part in scores], dim=-1).mul_(call.scaling)
        if call.softcap is not None:
            whole = whole.div_(call.softcap).tanh_().mul_(call.softcap)
        whole = whole.add_(self._mask(call, exact, blocks[-1].end))
        weights = torch.softmax(whole, dim=-1).to(queries.dtype).split([part.shape[-1] for part in scores], dim=-1)
        shared = weights[0].permute(0, 2, 3, 1, 4).flatten(2, 3)
        output = torch.matmul(shared, query.values).unflatten(2, (groups, width)).permute(0, 3, 1, 2, 4).to(exact)
        for part, block in zip(weights[1:], blocks, strict=True):
            output = output + torch.matmul(part.flatten(0, 1), block.values).unflatten(0, (count, width))
        if call.sinks is not None:
            output = with_sinks(output, whole.logsumexp(dim=-1, keepdim=True), call.sinks.view(-1, groups, 1))
        return output.to(queries.dtype)

    def _mask(self, call: AttentionCall, dtype: torch.dtype, end: int) -> Tensor:
        """Additive mask of this step, [N, 1, 1, 1, P + end]; the same for all layers of a kind."""
        mask = self._masks.get((call.window, call.chunk, dtype, end))
        if mask is None:
            lengths = self._lengths[:, None]
            columns = torch.arange(self.prompt.prompt, device=lengths.device)
            steps = torch.arange(end, device=lengths.device)
            seen = [columns < lengths, (steps <= self.step_index).expand(len(lengths), -1)]
            now = lengths + self.step_index
            if call.window is not None:
                seen[0] = seen[0] & (now - columns < call.window)
                seen[1] = seen[1] & (self.step_index - steps < call.window)
            if call.chunk is not None:
                seen[0] = seen[0] & (now // call.chunk == columns // call.chunk)
                seen[1] = seen[1] & (now // call.chunk == (lengths + steps) // call.chunk)
            mask = additive(torch.cat(seen, dim=1), dtype)[:, None, None, None]
            self._masks[call.window, call.chunk, dtype, end] = mask
        return mask

    def _blocks(self, layer: int, call: AttentionCall) -> list[KeyBlock]:
        """A layer's blocks, the last of which has this step's column."""
        blocks = self.blocks.setdefault(layer, [])
        start = blocks[-1].end if blocks else 0
        if self.step_index == start:
            rows, size = len(self.prompt.visible) * self.width, min(BLOCK, self.most - start)
            keys = call.key.new_zeros(rows, call.key.shape[1], call.key.shape[-1], size).transpose(2, 3)
            values = call.value.new_zeros(rows, call.value.shape[1], size, call.value.shape[-1])
            blocks.append(KeyBlock(start, keys, values))
        return blocks
