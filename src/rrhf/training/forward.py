"""One forward pass over records, from the host's side: token ids in, log-probability sums on the CPU out."""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rrhf.models.passes import response_logprobs
from rrhf.models.tokenization import EncodedRecord

# What a process computes while others are still busy: where weights are sharded, every pass is a collective operation.
IDLE = EncodedRecord("idle", [0], [[0]], [None])


@dataclass(frozen=True)
class ForwardOutputs:
    """What a forward pass says of its R responses, on the CPU and with the graph.

    ``sums``: Σ_t log P(y_t | …), Tensor of shape (R,). ``router_loss``: the auxiliary loss of a mixture of experts,
    a scalar, or None.
    """

    sums: Tensor
    router_loss: Tensor | None


def forward_records(
    model: nn.Module, records: Sequence[EncodedRecord], path: str, keep_logits: bool = False
) -> ForwardOutputs:
    """One call of ``model``, prepared by ``accept_records``, and one copy from its device.

    Losses and metrics are then made of a few numbers on the CPU: nothing more waits for the device, and fp64, which
    some devices lack, is there. Gradients cross the copy.
    """
    outputs: dict[str, Any] = model(rrhf_records=records, rrhf_path=path, rrhf_keep_logits=keep_logits)
    sums, router = outputs["sums"], outputs["router_loss"]
    if router is None:
        return ForwardOutputs(sums.cpu(), None)
    numbers = torch.cat([sums, router.reshape(1).to(sums.dtype)]).cpu()
    return ForwardOutputs(numbers[:-1], numbers[-1])


def accept_records(model: PreTrainedModel) -> None:
    """Teach this model's ``forward`` the keyword ``rrhf_records``; what it takes otherwise stays in its signature.

    Wrappers for several processes (DDP, FSDP) and autocast act on calls of the model, so the ranking pass must be one.
    """
    # A function of the model, not bound to this one: a copy's forward pass must be that of the copy.
    bound = model.forward
    plain = getattr(bound, "__func__", lambda _, *args, **kwargs: bound(*args, **kwargs))

    def forward(
        self: PreTrainedModel,
        *args: Any,
        rrhf_records: Any = None,
        rrhf_path: str = "tree",
        rrhf_keep_logits: bool = False,
        **kwargs: Any,
    ) -> Any:
        if rrhf_records is None:
            return plain(self, *args, **kwargs)
        logprobs = response_logprobs(self, rrhf_records, rrhf_path, rrhf_keep_logits)
        return {"sums": logprobs.sums, "router_loss": logprobs.router_loss}

    # Callers look here for what a model takes: decoding gives position_ids where they are named.
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(bound)
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[itself, *signature.parameters.values()]
    )
    model.forward = types.MethodType(forward, model)
