"""The decode loop that all sampling policies share: each query runs once, its responses read its keys together.

Keys and values of a query and of all its responses lie in buffers that never move: first the query's columns, then,
step by step, one column a slot. Which columns a slot may read is a mask that follows its ancestry, so beams
that change places change a few booleans instead of copying caches. Slots that finished leave the forward pass;
queries that finished leave the buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rrhf.common.errors import UserError
from rrhf.models.attention import NO_MASK, masked_attention, our_attention
from rrhf.models.kernels.cpu.products import packed
from rrhf.models.logprobs import output_logits
from rrhf.models.shared_prefix import causal_lm

PREFILL_TOKENS = 4096  # query tokens of one prefill forward
COMPACT_BELOW = 0.75  # share of live queries under which the buffers are packed anew
BLOCK = 64  # columns of a block of the cache, where it is cut into blocks
PACK_ROWS, PACK_TOKENS = 32, 32  # from so many rows a step and tokens a response on, laying weights out anew pays


@dataclass(frozen=True)
class Advance:
    """What a policy does next: the live ``slots`` [R] (query · width + slot), each one's ``parents`` [R] (the slot it
    continues) and the ``tokens`` [R] it appends."""

    slots: Tensor
    parents: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Response:
    """A response's ``tokens`` without its end token; ``finish`` is "stop" or "length"."""

    tokens: list[int]
    finish: str


class Policy(Protocol):
    """A sampling policy at work on one batch of queries."""

    width: int

    def advance(self, logits: Tensor, slots: Tensor) -> Advance:
        """Choose the next tokens from ``logits`` [R, V] of the live ``slots`` [R]; at first one slot a query."""
        ...

    def results(self) -> list[list[Response]]:
        """The responses of every query, when no slot is live any more."""
        ...


class Stepper(Protocol):
    """Runs a model over queries and then one token a slot at a time; both return logits."""

    def prefill(self) -> Tensor: ...

    def step(self, advance: Advance) -> Tensor: ...


@torch.inference_mode()
def decode(
    model: PreTrainedModel, queries: Sequence[list[int]], policy: Policy, max_new_tokens: int, path: str = "tree"
) -> list[list[Response]]:
    """Draw responses to ``queries`` (token ids) by ``policy``.

    Args:
        model: in evaluation mode.
        queries: token ids; none is empty.
        policy: its state for these queries.
        max_new_tokens: most tokens of a response.
        path: "tree" for models that take our attention, "padded" for others (transformers' own cache, slower).

    Returns:
        For each query its responses, in the policy's order.
    """
    stepper = STEPPERS[path](model, queries, policy.width, max_new_tokens)
    rows = len(queries) * policy.width
    with contextlib.ExitStack() as stack:
        if path == "tree":
            if rows >= PACK_ROWS and max_new_tokens >= PACK_TOKENS:
                stack.enter_context(packed(causal_lm(model), rows))
            stack.enter_context(our_attention(causal_lm(model)))
        slots = torch.arange(len(queries), device=_device(model)) * policy.width
        advance = policy.advance(stepper.prefill(), slots)
        while len(advance.slots):
            advance = policy.advance(stepper.step(advance), advance.slots)
    return policy.results()


def _device(model: PreTrainedModel) -> torch.device:
    return model.get_input_embeddings().weight.device


@dataclass
class _Block:
    """``keys`` and ``values`` [N, H_kv, C, D] of the columns [start, start + C)."""

    start: int
    keys: Tensor
    values: Tensor

    @property
    def end(self) -> int:
        return self.start + self.keys.shape[2]


class SharedCache:
    """The stepper on our attention, and the ``Layout`` of its forward calls.

    A layer's cache is one block of longest query + width · (max_new_tokens − 1) columns. Where plain products are
    faster than fused attention it is several, the queries' and then one for every ``BLOCK`` columns, since a product
    reads whole tensors as they lie and copies parts of them first; keys lie as [N, H_kv, D, C] there.
    """

    def __init__(self, model: PreTrainedModel, queries: Sequence[list[int]], width: int, max_new_tokens: int) -> None:
        self.model, self.width = causal_lm(model), width
        self.device = _device(model)
        self.queries = list(queries)
        self.lengths = torch.tensor([len(query) for query in queries], device=self.device)
        self.prompt = max(len(query) for query in queries)
        self.columns = self.prompt + width * (max_new_tokens - 1)
        self.blocks: dict[int, list[_Block]] = {}
        self.steps = 0
        # Which live query stands where in the buffers, and where each slot's query is found.
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
        logits, start = [], 0
        while start < len(self.queries):
            stop, tokens = start, 0
            while stop < len(self.queries) and (stop == start or tokens + len(self.queries[stop]) <= PREFILL_TOKENS):
                tokens += len(self.queries[stop])
                stop += 1
            logits.append(self._prefill(start, stop))
            start = stop
        found = torch.cat(logits)
        self._finite(found.amax(dim=-1))  # the output layer too, once: −inf for tokens that never come is sound
        return found

    def _finite(self, hidden: Tensor) -> Tensor:
        if not bool(torch.isfinite(hidden).all()):
            raise _not_numbers(self.model)
        return hidden

    def _prefill(self, start: int, stop: int) -> Tensor:
        queries = self.queries[start:stop]
        layout = _QueryPass(self, start, [len(query) for query in queries])
        ids = torch.tensor([token for query in queries for token in query], device=self.device)
        positions = torch.cat([torch.arange(len(query), device=self.device) for query in queries])
        hidden = self._forward(ids, positions, layout)
        return output_logits(self.model, hidden[self.lengths[start:stop].cumsum(0) - 1])

    def _forward(self, ids: Tensor, positions: Tensor, layout: object) -> Tensor:
        outputs = self.model.base_model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=NO_MASK.to(self.device),
            use_cache=False,
            rrhf_layout=layout,
        )
        return outputs.last_hidden_state[0]

    def block(self, layer: int, column: int, like: Tensor) -> _Block:
        """The block of a layer with ``column``, made when the first keys for it come (sizes differ between models)."""
        blocks = self.blocks.setdefault(layer, [])
        if not blocks or column >= blocks[-1].end:
            count = blocks[-1].keys.shape[0] if blocks else len(self.queries)
            plain = _plain_products(like)
            if not plain:
                end = self.columns
            elif not blocks:
                end = self.prompt
            else:
                end = min(column + max(BLOCK // self.width, 1) * self.width, self.columns)
            values = like.new_zeros(count, like.shape[1], end - column, like.shape[-1])
            keys = values.new_zeros(*values.transpose(2, 3).shape).transpose(2, 3) if plain else values.clone()
            blocks.append(_Block(column, keys, values))
        return blocks[-1]

    # -- one step

    def step(self, advance: Advance) -> Tensor:
        query, slot = advance.slots // self.width, advance.slots % self.width
        self._compact(query)
        row = self.place[query]
        column = self.prompt + self.steps * self.width
        # A slot reads what its parent read, and itself.
        inherited = self.visible[row, advance.parents % self.width]
        self.visible[row, slot] = inherited
        self.visible[row, slot, column + slot] = True
        self._row, self._slot, self._column = row, slot, column
        self._everything = len(row) == len(self.visible) * self.width
        self._masks: dict[tuple[int | None, torch.dtype, int], Tensor] = {}
        self.steps += 1
        hidden = self._finite(self._forward(advance.tokens, self.lengths[query] + self.steps - 1, self))
        return output_logits(self.model, hidden)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        block = self.block(layer, self._column, key)
        heads, size = key.shape[1], query.shape[-1]
        groups = query.shape[1] // heads
        count, column = len(block.keys), self._column - block.start
        if self._everything:  # all slots live, in order: plain views
            here = slice(column, column + self.width)
            block.keys[:, :, here] = key.view(heads, count, self.width, size).transpose(0, 1)
            block.values[:, :, here] = value.view(heads, count, self.width, -1).transpose(0, 1)
            queries = query.view(heads, groups, count, self.width, size).permute(2, 0, 1, 3, 4)
            queries = queries.reshape(count, heads, groups * self.width, size)
        else:
            block.keys[self._row, :, column + self._slot] = key[0].transpose(0, 1)
            block.values[self._row, :, column + self._slot] = value[0].transpose(0, 1)
            full = query.new_zeros(count, heads, groups, self.width, size)
            full[self._row, :, :, self._slot] = query.view(heads, groups, -1, size).permute(2, 0, 1, 3)
            queries = full.view(count, heads, groups * self.width, size)
        if _plain_products(query):
            mask = self._mask(window, torch.float32, groups, block.end)
            output = _attend_plainly(queries, self.blocks[layer], mask, scaling, softcap)
        else:
            end = self._column + self.width
            mask = self._mask(window, query.dtype, groups, end)
            output = masked_attention(queries, block.keys[:, :, :end], block.values[:, :, :end], mask, scaling, softcap)
        output = output.view(count, heads, groups, self.width, -1)
        if self._everything:
            return output.permute(0, 3, 1, 2, 4).reshape(1, count * self.width, heads * groups, -1)
        return output[self._row, :, :, self._slot].reshape(1, len(self._row), heads * groups, -1)

    def _mask(self, window: int | None, dtype: torch.dtype, groups: int, end: int) -> Tensor:
        """Additive mask of this step, [N, 1, groups · width, end]; the same for all layers of a kind."""
        found = self._masks.get((window, dtype, groups))
        if found is None:
            visible = self.visible[:, :, :end]
            if window is not None:
                now = self.positions[:, self._column : self._column + self.width]
                visible = visible & (now[:, :, None] - self.positions[:, None, :end] < window)
            found = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            found.masked_fill_(~visible, torch.finfo(dtype).min)
            found = found[:, None].repeat(1, 1, groups, 1)
            self._masks[window, dtype, groups] = found
        return found

    def _compact(self, query: Tensor) -> None:
        """Drop finished queries from the buffers once enough of them are."""
        live = torch.unique(query)
        if len(live) > COMPACT_BELOW * len(self.visible):
            return
        rows = self.place[live]
        for block in [block for blocks in self.blocks.values() for block in blocks]:
            if _plain_products(block.keys):
                block.keys = block.keys.transpose(2, 3)[rows].transpose(2, 3)
            else:
                block.keys = block.keys[rows]
            block.values = block.values[rows]
        self.visible, self.positions = self.visible[rows], self.positions[rows]
        self.place = torch.full_like(self.place, -1)
        self.place[live] = torch.arange(len(live), device=self.device)


def _plain_products(x: Tensor) -> bool:
    """Whether two products and a softmax beat torch's fused kernel for a few rows: on CPUs in bfloat16."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _attend_plainly(
    query: Tensor, blocks: Sequence[_Block], mask: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """``masked_attention`` over blocks of keys and values, as products a block around one softmax in fp32.

    ``query`` [N, H_kv, L, D] has as many heads as the keys; ``mask`` [N, 1, L, columns of all blocks].
    """
    scores = torch.empty(*query.shape[:3], mask.shape[-1], dtype=torch.float32, device=query.device)
    for block in blocks:
        scores[..., block.start : block.end] = torch.matmul(query, block.keys.transpose(2, 3))
    if softcap is not None:
        scores, scaling = scores.mul_(scaling / softcap).tanh_(), softcap
    weights = torch.softmax(torch.add(mask, scores, alpha=scaling, out=scores), dim=-1)
    parts = [torch.matmul(weights[..., b.start : b.end].to(query.dtype), b.values) for b in blocks]
    if len(parts) == 1:
        return parts[0]
    output = parts[0].float()
    for part in parts[1:]:
        output += part
    return output.to(query.dtype)


class _QueryPass:
    """The ``Layout`` of the pass over queries [start, start + n): causal inside each, keys kept in the cache."""

    def __init__(self, cache: SharedCache, start: int, lengths: list[int]) -> None:
        self.cache, self.start, self.lengths = cache, start, lengths
        self.masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        block = self.cache.block(layer, 0, key)
        outputs, begin = [], 0
        for i, length in enumerate(self.lengths):
            here = slice(begin, begin + length)
            k, v = key[:, :, here], value[:, :, here]
            block.keys[self.start + i, :, :length] = k[0]
            block.values[self.start + i, :, :length] = v[0]
            mask = self._mask(length, window, query)
            outputs.append(masked_attention(query[:, :, here], k, v, mask, scaling, softcap))
            begin += length
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def _mask(self, length: int, window: int | None, like: Tensor) -> Tensor:
        found = self.masks.get((length, window))
        if found is None:
            order = torch.arange(length, device=like.device)
            distance = order[:, None] - order[None, :]
            hidden = (distance < 0) | (distance >= (window or length))
            found = like.new_zeros(length, length).masked_fill_(hidden, torch.finfo(like.dtype).min)
            self.masks[length, window] = found
        return found


class TransformersCache:
    """The stepper for models that do not take our attention: transformers' cache, queries padded on the left."""

    def __init__(self, model: PreTrainedModel, queries: Sequence[list[int]], width: int, max_new_tokens: int) -> None:
        self.model, self.width, self.queries = model, width, list(queries)
        self.device = _device(model)
        self.cache = DynamicCache(config=model.config)
        longest = max(len(query) for query in queries)
        self.mask = torch.zeros(len(queries), longest, dtype=torch.long, device=self.device)
        for i, query in enumerate(queries):
            self.mask[i, longest - len(query) :] = 1
        self.rows = torch.arange(len(queries), device=self.device) * width  # the slot each row of the cache holds
        self.stepped = False

    def prefill(self) -> Tensor:
        ids = torch.zeros_like(self.mask)
        for i, query in enumerate(self.queries):
            ids[i, -len(query) :] = torch.tensor(query, device=self.device)
        return self._forward(ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    def step(self, advance: Advance) -> Tensor:
        row_of = {int(slot): row for row, slot in enumerate(self.rows)}
        # After the prefill a query has one row, which all its slots continue.
        parents = advance.parents if self.stepped else advance.parents // self.width * self.width
        self.stepped = True
        rows = torch.tensor([row_of[int(parent)] for parent in parents], device=self.device)
        self.cache.reorder_cache(rows)
        self.mask = torch.cat([self.mask[rows], self.mask.new_ones(len(rows), 1)], dim=1)
        self.rows = advance.slots
        return self._forward(advance.tokens[:, None], self.mask.sum(1, keepdim=True) - 1)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        import inspect

        options = {"position_ids": positions}
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            options = {}  # ALiBi models count positions from the mask
        outputs = self.model(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **options
        )
        logits: Tensor = outputs.logits[:, -1]
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):  # −inf for tokens that never come is sound
            raise _not_numbers(self.model)
        return logits


def _not_numbers(model: PreTrainedModel) -> UserError:
    return UserError(
        f"{model.config._name_or_path or type(model).__name__}: its outputs are no finite numbers, so nothing can be "
        "drawn from them. Its weights may be damaged, or overflow in their type (try --dtype float32)"
    )


STEPPERS: dict[str, type[SharedCache] | type[TransformersCache]] = {"tree": SharedCache, "padded": TransformersCache}
