"""The log-probability of a response as simply as it can be computed: one row, one forward, the whole log-softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rrhf.models.tokenization import EncodedRecord


def response_sum(model: Any, query: Sequence[int], response: Sequence[int]) -> Tensor:
    """Σ_t log P(y_t | x, y_<t), a scalar with its graph."""
    ids = [*query, *response]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    table = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    total = table.new_zeros(())
    for t in range(len(query), len(ids)):
        total = total + table[t - 1, ids[t]]
    return total


def response_tokens(model: Any, query: Sequence[int], response: Sequence[int]) -> Tensor:
    """log P(y_t | x, y_<t) of every token, with their graph. Tensor of shape (len(response),)."""
    ids = [*query, *response]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    table = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    return torch.stack([table[t - 1, ids[t]] for t in range(len(query), len(ids))])


def record_sums(model: Any, record: EncodedRecord) -> Tensor:
    """The sums of a record's k responses, each from a forward of its own. Tensor of shape (k,)."""
    return torch.stack([response_sum(model, record.query, response) for response in record.responses])


def all_sums(model: Any, records: Sequence[EncodedRecord]) -> Tensor:
    """The sums of the responses of all records, in order."""
    return torch.cat([record_sums(model, record) for record in records])
