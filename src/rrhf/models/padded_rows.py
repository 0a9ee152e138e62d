"""The log-probabilities of responses in padded rows, one a response: for models that take no trees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rrhf.models.forward import Logprobs, router_loss, router_options
from rrhf.models.tokenization import EncodedRecord


def padded_logprobs(model: PreTrainedModel, records: Sequence[EncodedRecord], keep_hidden: bool = False) -> Logprobs:
    """One row a response, padded on the right; for models that do not take trees. Eq. 1's sums, token for token."""
    device = model.get_input_embeddings().weight.device
    rows = [(record.query, response) for record in records for response in record.responses]
    width = max(len(query) + len(response) for query, response in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    target = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (query, response) in enumerate(rows):
        size = len(query) + len(response)
        input_ids[i, :size] = torch.tensor([*query, *response])
        mask[i, :size] = 1
        target[i, len(query) : size] = True
    input_ids, mask, target = input_ids.to(device), mask.to(device), target.to(device)
    options = {**router_options(model), **({"output_hidden_states": True} if keep_hidden else {})}
    outputs = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **options)
    logits = outputs.logits[:, :-1]
    each = []
    for i in range(len(rows)):  # a row at a time: its log-softmax in fp32 is the largest tensor of the pass
        keep = target[i, 1:]
        rest = logits[i][keep]
        logprobs = torch.log_softmax(rest if rest.dtype == torch.float64 else rest.float(), dim=-1)
        each.append(logprobs.gather(1, input_ids[i, 1:][keep][:, None])[:, 0])
    lengths = torch.tensor([len(response) for _, response in rows], device=device)
    sums = torch.stack([logprobs.sum() for logprobs in each])
    hidden = outputs.hidden_states[-1][:, :-1][target[:, 1:]] if keep_hidden else None
    return Logprobs(sums, lengths, int(mask.sum()), router_loss(model, outputs), torch.cat(each), hidden)
