"""Decoding on our attention: each query runs once, however often it stands there; its responses read its keys together.

Keys and values of a query and of all its responses lie in buffers that never move: first the query's columns, then,
step by step, one column a slot. Which columns a slot may read is a mask that follows its ancestry, so beams
that change places change a few booleans instead of copying caches. Slots that finished leave the forward pass;
queries that finished leave the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrhf.models.attention import NO_MASK, Layout
from rrhf.models.forward import causal_lm, decoder
from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.choice import kernels_for
from rrhf.models.kernels.key_cache import KeyCache
from rrhf.models.kernels.reference import additive
from rrhf.models.logprobs import output_logits
from rrhf.sampling.stepping import Advance, FiniteCheck, device_of

PREFILL_TOKENS = 4096  # query tokens of one prefill forward
COMPACT_BELOW = 0.75  # share of live queries under which the buffers are packed anew


class SlotLayout(Layout, Protocol):
    """A layout that is told the positions of the forward pass at hand."""

    position_ids: Tensor


class SharedCache:
    """The stepper on our attention, and the ``Layout`` of its forward calls.

    A layer's cache has longest query + width · (max_new_tokens − 1) columns; how they lie is the device's choice.
    """

    def __init__(self, model: PreTrainedModel, queries: Sequence[list[int]], width: int, max_new_tokens: int) -> None:
        self.model, self.width = causal_lm(model), width
        self.device = device_of(model)
        self.queries = list(queries)
        self.lengths = torch.tensor([len(query) for query in queries], device=self.device)
        self.prompt = max(len(query) for query in queries)
        self.columns = self.prompt + width * (max_new_tokens - 1)
        self.layers: dict[int, KeyCache] = {}
        self.position_ids: Tensor  # of the forward pass at hand
        self.steps = 0
        self.finite = FiniteCheck(self.model)
        self.no_mask = NO_MASK.to(self.device)
        self.live_rows = len(queries) * width  # rows of the last step; they only become fewer
        # Which row of the buffers holds each live query.
        self.place = torch.arange(len(queries), device=self.device)
        count = len(queries)
        self.visible = torch.zeros(count, width, self.columns, dtype=torch.bool, device=self.device)
        self.visible[:, :, : self.prompt] = (torch.arange(self.prompt, device=self.device) < self.lengths[:, None])[
            :, None
        ]
        self.positions = torch.arange(self.columns, device=self.device).repeat(count, 1)
        steps = torch.arange(self.columns - self.prompt, device=self.device) // width
        self.positions[:, self.prompt :] = self.lengths[:, None] + steps

    # -- the query pass

    def prefill(self) -> Tensor:
        rows: dict[tuple[int, ...], list[int]] = {}  # where each query stands: evaluations draw several times for one
        for row, query in enumerate(self.queries):
            rows.setdefault(tuple(query), []).append(row)
        queries, logits, start = list(rows), [], 0
        while start < len(queries):
            stop, tokens = start, 0
            while stop < len(queries) and (stop == start or tokens + len(queries[stop]) <= PREFILL_TOKENS):
                tokens += len(queries[stop])
                stop += 1
            logits.append(self._prefill({query: rows[query] for query in queries[start:stop]}))
            start = stop
        place = {query: i for i, query in enumerate(queries)}
        whole = torch.cat(logits)[[place[tuple(query)] for query in self.queries]]
        self.finite.add(whole.amax(dim=-1))  # the output layer too, once: −inf for tokens that never come is sound
        return whole

    def _prefill(self, rows: Mapping[tuple[int, ...], Sequence[int]]) -> Tensor:
        layout = _QueryPass(self, [(len(query), where) for query, where in rows.items()])
        ids = torch.tensor([token for query in rows for token in query], device=self.device)
        positions = torch.cat([torch.arange(len(query), device=self.device) for query in rows])
        hidden = self.forward(ids, positions, layout)
        lasts = torch.tensor([len(query) for query in rows], device=self.device).cumsum(0) - 1
        return output_logits(self.model, hidden[lasts])

    def forward(self, ids: Tensor, positions: Tensor, layout: SlotLayout) -> Tensor:
        """Last hidden states [T, hidden_size] of token ids and positions [T], under ``layout``."""
        layout.position_ids = positions[None]
        outputs = decoder(self.model)(
            input_ids=ids[None],
            position_ids=layout.position_ids,
            attention_mask=self.no_mask,
            use_cache=False,
            rrhf_layout=layout,
        )
        return outputs.last_hidden_state[0]

    def layer(self, layer: int, key: Tensor, value: Tensor) -> KeyCache:
        """A layer's cache, made when its first keys come (sizes differ between models)."""
        if layer not in self.layers:
            kernels = kernels_for(self.device)
            self.layers[layer] = kernels.key_cache(key, value, len(self.queries), self.prompt, self.width, self.columns)
        return self.layers[layer]

    # -- one step

    def step(self, advance: Advance) -> Tensor:
        query, slot = advance.slots // self.width, advance.slots % self.width
        self.compact(query)
        row = self.place[query]
        column = self.prompt + self.steps * self.width
        # A slot reads what its parent read, and itself.
        inherited = self.visible[row, advance.parents % self.width]
        self.visible[row, slot] = inherited
        self.visible[row, slot, column + slot] = True
        self._row, self._slot, self._column = row, slot, column
        self._everything = len(row) == len(self.visible) * self.width
        self._masks: dict[tuple[int | None, int | None, torch.dtype, int], Tensor] = {}
        self.steps += 1
        hidden = self.forward(advance.tokens, self.lengths[query] + self.steps - 1, self)
        self.finite.add(hidden)
        return output_logits(self.model, hidden)

    def attend(self, layer: int, call: AttentionCall) -> Tensor:
        cache = self.layer(layer, call.key, call.value)
        block = cache.block(self._column)
        heads, size = call.key.shape[1], call.query.shape[-1]
        groups = call.query.shape[1] // heads
        count, column = len(block.keys), self._column - block.start
        if self._everything:  # all slots live, in order: plain views
            here = slice(column, column + self.width)
            block.keys[:, :, here] = call.key.view(heads, count, self.width, size).transpose(0, 1)
            block.values[:, :, here] = call.value.view(heads, count, self.width, -1).transpose(0, 1)
            queries = call.query.view(heads, groups, count, self.width, size).permute(2, 0, 1, 3, 4)
            queries = queries.reshape(count, heads, groups * self.width, size)
        else:
            block.keys[self._row, :, column + self._slot] = call.key[0].transpose(0, 1)
            block.values[self._row, :, column + self._slot] = call.value[0].transpose(0, 1)
            full = call.query.new_zeros(count, heads, groups, self.width, size)
            full[self._row, :, :, self._slot] = call.query.view(heads, groups, -1, size).permute(2, 0, 1, 3)
            queries = full.view(count, heads, groups * self.width, size)
        end = cache.columns_read(self._column + self.width)
        mask = self._mask(call, cache.mask_type(queries.dtype), groups, end)
        if call.sinks is not None:  # one for every row of a key head
            call = replace(call, sinks=call.sinks.view(heads, groups).repeat_interleave(self.width, dim=1))
        output = cache.attend(call, queries, mask).view(count, heads, groups, self.width, -1)
        if self._everything:
            output = output.permute(0, 3, 1, 2, 4).reshape(1, count * self.width, heads * groups, -1)
        else:
            output = output[self._row, :, :, self._slot].reshape(1, len(self._row), heads * groups, -1)
        return output.contiguous()  # of one query, or of one slot, it may be a view

    def _mask(self, call: AttentionCall, dtype: torch.dtype, groups: int, end: int) -> Tensor:
        """Additive mask of this step, [N, 1, groups · width, end]; the same for all layers of a kind."""
        mask = self._masks.get((call.window, call.chunk, dtype, groups))
        if mask is None:
            seen, before = self.visible[:, :, :end], self.positions[:, None, :end]
            now = self.positions[:, self._column : self._column + self.width, None]
            if call.window is not None:
                seen = seen & (now - before < call.window)
            if call.chunk is not None:
                seen = seen & (now // call.chunk == before // call.chunk)
            mask = additive(seen, dtype)[:, None].repeat(1, 1, groups, 1)
            self._masks[call.window, call.chunk, dtype, groups] = mask
        return mask

    def compact(self, query: Tensor) -> Tensor | None:
        """Drop finished queries from the buffers once enough of them are; returns the rows that stay, if not all do.

        ``query``: of every live slot its query, [R].
        """
        if len(query) == self.live_rows:
            return None
        self.live_rows = len(query)
        live = torch.unique(query)
        if len(live) > COMPACT_BELOW * len(self.visible):
            return None
        rows = self.place[live]
        for cache in self.layers.values():
            cache.select(rows)
        self.visible, self.positions = self.visible[rows], self.positions[rows]
        self.place = torch.full_like(self.place, -1)
        self.place[live] = torch.arange(len(live), device=self.device)
        return rows


class _QueryPass:
    """The ``Layout`` of the pass over queries: causal inside each, keys kept in every row of the cache that has it.

    ``queries``: of each its length and its rows.
    """

    def __init__(self, cache: SharedCache, queries: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.cache, self.queries = cache, queries
        self.position_ids: Tensor
        self.masks: dict[tuple[int, int | None, int | None], Tensor] = {}

    def attend(self, layer: int, call: AttentionCall) -> Tensor:
        block = self.cache.layer(layer, call.key, call.value).block(0)
        attention = kernels_for(self.cache.device).masked_attention
        outputs, begin = [], 0
        for length, rows in self.queries:
            here = slice(begin, begin + length)
            query, key, value = (x[:, :, here] for x in (call.query, call.key, call.value))
            for row in rows:
                block.keys[row, :, :length] = key[0]
                block.values[row, :, :length] = value[0]
            outputs.append(attention(call.over(query, key, value), self._mask(length, call)))
            begin += length
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()

    def _mask(self, length: int, call: AttentionCall) -> Tensor:
        mask = self.masks.get((length, call.window, call.chunk))
        if mask is None:
            order = torch.arange(length, device=call.query.device)
            distance = order[:, None] - order[None, :]
            seen = (distance >= 0) & (distance < (call.window or length))
            if call.chunk is not None:
                seen &= order[:, None] // call.chunk == order // call.chunk
            mask = additive(seen, call.query.dtype)
            self.masks[length, call.window, call.chunk] = mask
        return mask
