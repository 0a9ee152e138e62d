"""The log-probabilities of responses under a model, by whichever pass it takes."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from rrhf.models.forward import Logprobs
from rrhf.models.padded_rows import padded_logprobs
from rrhf.models.shared_prefix import tree_logprobs
from rrhf.models.tokenization import EncodedRecord


def response_logprobs(
    model: PreTrainedModel, records: Sequence[EncodedRecord], path: str = "tree", keep_logits: bool = False
) -> Logprobs:
    """Score every response of ``records`` under ``model``: as trees, or (``padded``) one padded row a response.

    ``keep_logits`` lets the tree pass keep its logits for the backward pass where they are not large, which is faster.
    """
    return tree_logprobs(model, records, keep_logits) if path == "tree" else padded_logprobs(model, records)
