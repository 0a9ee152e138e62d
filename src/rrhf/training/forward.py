"""One forward pass over records, from the host's side: token ids in, log-probability sums on the CPU out."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rrhf.models.batching import Forward
from rrhf.models.out_of_memory import run_forwards
from rrhf.models.passes import response_logprobs
from rrhf.models.tokenization import EncodedRecord

# What a process computes while others are still busy: where weights are sharded, every pass is a collective operation.
IDLE = EncodedRecord("idle", [0], [[0]], [None])


@dataclass(frozen=True)
class ForwardOutputs:
    """What a forward pass says of its R responses, on the CPU and with the graph.

    ``sums``: Σ_t log P(y_t | …), Tensor of shape (R,). ``router_loss``: the auxiliary loss of a mixture of experts,
    a scalar, or None. ``token_logprobs``: log P(y_t | …) of all response tokens in order, Tensor of shape (N,), or None
    where they were not asked for.
    """

    sums: Tensor
    router_loss: Tensor | None
    token_logprobs: Tensor | None = None


Compute = Callable[[Sequence[EncodedRecord]], ForwardOutputs]


def forward_records(
    model: nn.Module, records: Sequence[EncodedRecord], path: str, keep_logits: bool = False, tokens: bool = False
) -> ForwardOutputs:
    """One call of ``model``, prepared by ``accept_records``, and one copy from its device.

    Losses and metrics are then made of a few numbers on the CPU: nothing more waits for the device, and fp64, which
    some devices lack, is there. Gradients cross the copy.
    """
    outputs: dict[str, Any] = model(
        rrhf_records=records, rrhf_path=path, rrhf_keep_logits=keep_logits, rrhf_tokens=tokens
    )
    sums, router = outputs["sums"], outputs["router_loss"]
    parts = [sums, *([outputs["token_logprobs"]] if tokens else [])]
    parts += [] if router is None else [router.reshape(1).to(sums.dtype)]
    numbers = (torch.cat(parts) if len(parts) > 1 else sums).cpu()
    whole = numbers if router is None else numbers[:-1]
    return ForwardOutputs(
        whole[: len(sums)], None if router is None else numbers[-1], whole[len(sums) :] if tokens else None
    )


def where_scaled(trainer: Any, loss: Tensor) -> Tensor:
    """A loss on the CPU, on the device where a ``transformers.Trainer`` takes ``backward`` of it.

    A gradient scaler (fp16) keeps its scale where the first loss was. On the CPU it would read there at once, without
    waiting for the copy, whether a gradient on the device is infinite.
    """
    return loss if trainer.accelerator.scaler is None else loss.to(trainer.args.device)


@torch.no_grad()
def measure(
    model: nn.Module, records: Sequence[EncodedRecord], compute: Compute, budget: int, path: str
) -> list[ForwardOutputs]:
    """What ``compute``, a pass of ``model``, says of each record, in order and without a graph.

    Where memory runs out, fewer tokens pass at a time.

    Raises:
        UserError: a pass over one response does not fit.
    """
    places = {id(record): place for place, record in enumerate(records)}
    found: list[ForwardOutputs | None] = [None] * len(records)

    def run(forward: Forward) -> list[ForwardOutputs]:
        return [compute(part) for part in forward.parts()]

    for forward, outputs in run_forwards(model, records, budget, path, run):
        sums = torch.cat([output.sums for output in outputs])
        lengths = [len(response) for record in forward.records for response in record.responses]
        given = [output.token_logprobs for output in outputs if output.token_logprobs is not None]
        tokens = torch.cat(given).split(lengths) if given else None
        start = 0
        for record in forward.records:
            stop = start + len(record.responses)
            own = None if tokens is None else torch.cat(tokens[start:stop])
            found[places[id(record)]] = ForwardOutputs(sums[start:stop], None, own)
            start = stop
    return cast("list[ForwardOutputs]", found)


def accept_records(model: PreTrainedModel) -> None:
    """Teach this model's ``forward`` the keyword ``rrhf_records``; what it takes otherwise stays in its signature.

    Wrappers for several processes (DDP, FSDP) and autocast act on calls of the model, so the ranking pass must be one.
    A model that was taught is left as it is.
    """
    if getattr(model.forward, _TAUGHT, False):
        return
    # A function of the model, not bound to this one: a copy's forward pass must be that of the copy.
    bound = model.forward
    plain = getattr(bound, "__func__", lambda _, *args, **kwargs: bound(*args, **kwargs))

    def forward(
        self: PreTrainedModel,
        *args: Any,
        rrhf_records: Any = None,
        rrhf_path: str = "tree",
        rrhf_keep_logits: bool = False,
        rrhf_tokens: bool = False,
        **kwargs: Any,
    ) -> Any:
        if rrhf_records is None:
            return plain(self, *args, **kwargs)
        logprobs = response_logprobs(self, rrhf_records, rrhf_path, rrhf_keep_logits)
        tokens = {"token_logprobs": logprobs.token_logprobs} if rrhf_tokens else {}
        return {"sums": logprobs.sums, "router_loss": logprobs.router_loss, **tokens}

    vars(forward)[_TAUGHT] = True
    # Callers look here for what a model takes: decoding gives position_ids where they are named.
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(bound)
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[itself, *signature.parameters.values()]
    )
    model.forward = types.MethodType(forward, model)


_TAUGHT = "_rrhf_takes_records"  # the attribute of such a ``forward``
