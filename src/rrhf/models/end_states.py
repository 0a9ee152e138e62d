"""The last hidden state of a response's last token, for heads that read there: by trees or in padded rows.

Unlike in the passes over log-probabilities, a response's last token is an input here, and reads all before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrhf.models.attention import NO_MASK, Layout, our_attention
from rrhf.models.rotations import warn_of_rows
from rrhf.models.shared_prefix import Forest, lay_out
from rrhf.models.tokenization import EncodedRecord


def tree_end_states(
    backbone: PreTrainedModel, records: Sequence[EncodedRecord], watch: Callable[[Forest], Layout] | None = None
) -> Tensor:
    """The tree pass: what the responses of a record share, their ``query``, is computed once.

    Args:
        backbone: a causal decoder without a head, which must look its attention up in transformers' interface.
        records: R responses in all; one that is empty ends where its query does.
        watch: gives the layout that stands in for the forest.

    Returns:
        Tensor of shape (R, hidden_size), in the backbone's type.
    """
    # What ends a response is left out of a forest, since it predicts nothing: here that is a token nobody reads.
    longer = [replace(record, responses=[[*response, 0] for response in record.responses]) for record in records]
    forest = lay_out(longer, backbone.get_input_embeddings().weight.device)
    with our_attention(backbone):
        outputs = backbone(
            input_ids=forest.input_ids,
            position_ids=forest.position_ids,
            attention_mask=torch.zeros(NO_MASK.shape, device=forest.input_ids.device),
            use_cache=False,
            rrhf_layout=forest if watch is None else watch(forest),
        )
    ends: Tensor = forest.rows[forest.lengths.cumsum(0) - 1]
    return outputs.last_hidden_state[0][ends]


def padded_end_states(backbone: PreTrainedModel, records: Sequence[EncodedRecord]) -> Tensor:
    """The same with one row a response, padded on the right. Tensor of shape (R, hidden_size)."""
    device = backbone.get_input_embeddings().weight.device
    rows = [[*record.query, *response] for record in records for response in record.responses]
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    outputs = backbone(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False)
    hidden: Tensor = outputs.last_hidden_state
    return hidden[torch.arange(len(rows), device=device), (lengths - 1).to(device)]


def end_states(backbone: PreTrainedModel, records: Sequence[EncodedRecord], path: str) -> Tensor:
    """The end states of all responses of ``records``, as trees or in padded rows. Tensor of shape (R, hidden_size)."""
    warn_of_rows(backbone, records)
    return tree_end_states(backbone, records) if path == "tree" else padded_end_states(backbone, records)
