"""The log-probabilities of k responses in one forward pass: the query once, its responses behind it as a tree.

A record's row is ``[query | y_1 | y_2 | … | y_k]``; every response sees the query and its own beginning, its
positions go on where the query ends, and the rows of several records stand behind each other without padding. The last
token of a response predicts nothing and is left out. Who sees whom is one vector: row q reads column k iff
k ≤ q < end[k].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrhf.models.attention import NO_MASK, Layout, our_attention
from rrhf.models.forward import Logprobs, causal_lm, decoder, router_loss, router_options
from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.choice import kernels_for, wants_flex
from rrhf.models.kernels.transfer import on_device
from rrhf.models.logprobs import token_logprobs
from rrhf.models.tokenization import EncodedRecord
from rrhf.models.trees import Tree, column_ends


@dataclass(frozen=True)
class Forest:
    """Several records in one row of T tokens; it is the ``Layout`` of that forward call.

    ``input_ids``, ``position_ids``: [1, T]. ``ends``: [T], where each token stops being read (``column_ends``).
    ``rows``, ``targets``, ``owners``: [N], for each of the N response tokens the row whose output predicts it, its id,
    and the response (counted through all records) it belongs to. ``lengths``: ‖y_i‖ of all responses. ``flex``: whether
    layers attend by FlexAttention instead of what the device does otherwise.
    """

    trees: tuple[Tree, ...]
    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor
    rows: Tensor
    targets: Tensor
    owners: Tensor
    lengths: Tensor
    flex: bool = False

    def attend(self, layer: int, call: AttentionCall) -> Tensor:
        device = call.query.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            call = call.over(call.query.to(dtype), call.key.to(dtype), call.value.to(dtype))
        return self._attention(call)

    @cached_property
    def _attention(self) -> Callable[[AttentionCall], Tensor]:
        kernels = kernels_for(self.input_ids.device, self.flex)
        return kernels.tree_attention(self.trees, self.ends, self.position_ids[0])


def lay_out(records: Sequence[EncodedRecord], device: torch.device | str = "cpu", flex: bool = False) -> Forest:
    """Lay records out as one row of trees. Responses may be empty: they have length 0 and log-probability 0."""
    trees: list[Tree] = []
    input_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    lengths: list[int] = []
    for record in records:
        start, last_of_query = len(input_ids), len(input_ids) + len(record.query) - 1
        input_ids += record.query
        positions += range(len(record.query))
        for response in record.responses:
            if response:
                rows += [last_of_query, *range(len(input_ids), len(input_ids) + len(response) - 1)]
            input_ids += response[:-1]
            positions += range(len(record.query), len(record.query) + len(response[:-1]))
            targets += response
            owners += [len(lengths)] * len(response)
            lengths.append(len(response))
        inputs = tuple(len(response[:-1]) for response in record.responses)
        trees.append(Tree(start, len(record.query), inputs))

    vectors = (input_ids, positions, column_ends(trees), rows, targets, owners, lengths)
    arrays = [np.array(vector, dtype=np.int64) for vector in vectors]
    row, places, ends, predictors, answers, whose, sizes = on_device(arrays, torch.device(device))
    return Forest(tuple(trees), row[None], places[None], ends, predictors, answers, whose, sizes, flex)


def tree_logprobs(
    model: PreTrainedModel, records: Sequence[EncodedRecord], keep_logits: bool = False, keep_hidden: bool = False
) -> Logprobs:
    """The tree pass; ``model`` must look its attention up in transformers' interface."""
    model = causal_lm(model)
    forest = lay_out(records, model.get_input_embeddings().weight.device, wants_flex(model))
    return forest_logprobs(model, forest, keep_logits, keep_hidden=keep_hidden)


def tree_hidden(model: PreTrainedModel, records: Sequence[EncodedRecord]) -> Tensor:
    """``Logprobs.hidden`` by the tree pass, without the output layer."""
    model = causal_lm(model)
    forest = lay_out(records, model.get_input_embeddings().weight.device, wants_flex(model))
    hidden: Tensor = _decoded(model, forest, forest).last_hidden_state[0][forest.rows]
    return hidden


def _decoded(model: PreTrainedModel, forest: Forest, layout: Layout) -> Any:
    """What the decoder says of the forest's row."""
    with our_attention(model):
        return decoder(model)(
            input_ids=forest.input_ids,
            position_ids=forest.position_ids,
            attention_mask=torch.zeros(NO_MASK.shape, device=forest.input_ids.device),
            use_cache=False,
            rrhf_layout=layout,
            **router_options(model),
        )


def forest_logprobs(
    model: PreTrainedModel,
    forest: Forest,
    keep_logits: bool = False,
    layout: Layout | None = None,
    keep_hidden: bool = False,
) -> Logprobs:
    """The tree pass over records laid out; ``layout`` may stand in for the forest itself."""
    outputs = _decoded(model, forest, forest if layout is None else layout)
    hidden = outputs.last_hidden_state[0][forest.rows]
    logprobs = token_logprobs(model, hidden, forest.targets, keep_logits)
    sums = torch.zeros(len(forest.lengths), dtype=logprobs.dtype, device=logprobs.device)
    sums = sums.index_add(0, forest.owners, logprobs)
    tokens, router = forest.input_ids.shape[1], router_loss(model, outputs)
    return Logprobs(sums, forest.lengths, tokens, router, logprobs, hidden if keep_hidden else None)
