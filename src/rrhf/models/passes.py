"""The log-probabilities of responses under a model, by whichever pass it takes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from rrhf.models.forward import Logprobs
from rrhf.models.padded_rows import padded_logprobs
from rrhf.models.rotations import warn_of_rows
from rrhf.models.shared_prefix import tree_hidden, tree_logprobs
from rrhf.models.tokenization import EncodedRecord


def response_logprobs(
    model: PreTrainedModel,
    records: Sequence[EncodedRecord],
    path: str = "tree",
    keep_logits: bool = False,
    keep_hidden: bool = False,
) -> Logprobs:
    """Score every response of ``records`` under ``model``: as trees, or (``padded``) one padded row a response.

    ``keep_logits`` lets the tree pass keep its logits for the backward pass where they are not large, which is faster.
    ``keep_hidden`` gives the hidden states that predict the response tokens too.
    """
    warn_of_rows(model, records)
    if path == "tree":
        return tree_logprobs(model, records, keep_logits, keep_hidden)
    return padded_logprobs(model, records, keep_hidden)


def response_hidden(model: PreTrainedModel, records: Sequence[EncodedRecord], path: str = "tree") -> Tensor:
    """The last hidden states that predict each response token, Tensor of shape (N, hidden_size)."""
    if path == "tree":
        return tree_hidden(model, records)
    hidden = padded_logprobs(model, records, keep_hidden=True).hidden
    assert hidden is not None
    return hidden
