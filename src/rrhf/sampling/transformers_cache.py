"""Decoding with transformers' own cache: for models that do not take our attention."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rrhf.models.forward import causal_lm
from rrhf.sampling.stepping import Advance, FiniteCheck, device_of

CACHE_NAMES = ("past_key_values", "cache", "cache_params")  # what forward passes call it, by transformers' version


class TransformersCache:
    """The stepper for models that do not take our attention: transformers' cache, queries padded on the left."""

    def __init__(self, model: PreTrainedModel, queries: Sequence[list[int]], width: int, max_new_tokens: int) -> None:
        # Inside an adapter's wrapper, whose own signature hides what the model's forward pass takes.
        self.model, self.width, self.queries = causal_lm(model), width, list(queries)
        self.takes = inspect.signature(self.model.forward).parameters
        self.device = device_of(model)
        self.cache = DynamicCache(config=model.config)
        longest = max(len(query) for query in queries)
        self.mask = torch.zeros(len(queries), longest, dtype=torch.long, device=self.device)
        for i, query in enumerate(queries):
            self.mask[i, longest - len(query) :] = 1
        self.rows = torch.arange(len(queries), device=self.device) * width  # the slot each row of the cache holds
        self.stepped = False
        self.finite = FiniteCheck(self.model)

    def prefill(self) -> Tensor:
        ids = torch.zeros_like(self.mask)
        for i, query in enumerate(self.queries):
            ids[i, -len(query) :] = torch.tensor(query, device=self.device)
        return self._forward(ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    def step(self, advance: Advance) -> Tensor:
        # After the prefill a query has one row, which all its slots continue.
        parents = advance.parents if self.stepped else advance.parents // self.width * self.width
        self.stepped = True
        rows = torch.searchsorted(self.rows, parents)  # slots come in order
        self.cache.reorder_cache(rows)
        self.mask = torch.cat([self.mask[rows], self.mask.new_ones(len(rows), 1)], dim=1)
        self.rows = advance.slots
        return self._forward(advance.tokens[:, None], self.mask.sum(1, keepdim=True) - 1)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        # ALiBi models count positions from the mask; a padded batch has no use for a router loss, nor can it be made;
        # of the queries only the last position's logits are needed.
        options = {"position_ids": positions, "output_router_logits": False, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in self.takes}
        # A cache by another name is not refused but ignored.
        cache = next((name for name in CACHE_NAMES if name in self.takes), "past_key_values")
        options[cache] = self.cache
        outputs = self.model(input_ids=ids, attention_mask=self.mask, use_cache=True, **options)
        logits: Tensor = outputs.logits[:, -1]
        self.finite.add(logits.amax(dim=-1))  # −inf for tokens that never come is sound
        return logits
