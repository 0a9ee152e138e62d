"""One attention function for transformers' models whose keys are laid out by us: trees in training, shared queries in
sampling.

Models that look their attention up in transformers' interface are switched to ``rrhf``. Where a forward call carries
a layout (keyword ``rrhf_layout``), the layout decides who sees whom; where it does not, the call is plain
``sdpa``. The layout travels as an argument, so that recomputation under gradient checkpointing sees it too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.choice import kernels_for

NAME = "rrhf"

# What attention modules may pass beside the tensors: these are part of an AttentionCall …
_IMPLEMENTED = {"sliding_window", "softcap"}
# … and these change nothing in a forward call with a layout. Any other option might, and is refused.
_WITHOUT_EFFECT = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}
_KNOWN = _IMPLEMENTED | _WITHOUT_EFFECT


class Layout(Protocol):
    """Who sees whom in one forward call."""

    def attend(self, layer: int, call: AttentionCall) -> Tensor:
        """Attend from the queries [1, H, T, D] of ``call`` to its keys [1, H_kv, T, D]; returns [1, T, H, D]."""
        ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rrhf_layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers' attention interface under the name ``rrhf``.

    Raises:
        NotImplementedError: under a layout, an option whose effect on the result is not known here.
    """
    if rrhf_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    unknown = [name for name, value in options.items() if value is not None and name not in _KNOWN]
    if unknown and (unknown != ["is_causal"] or not options["is_causal"]):
        raise NotImplementedError(f"attention option {', '.join(unknown)}")
    call = AttentionCall(
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        dropout=dropout,
    )
    return rrhf_layout.attend(int(module.layer_idx), call), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

# A mask that is already 4-D is passed through untouched, so no [T, T] mask is built that a layout would not read.
NO_MASK = torch.zeros(1, 1, 1, 1)


def takes_layouts(model: PreTrainedModel) -> bool:
    """Whether the model looks its attention up in transformers' interface (its numbers are checked elsewhere)."""
    return bool(model._can_set_attn_implementation())


@contextlib.contextmanager
def our_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch ``model`` to the ``rrhf`` attention and its device's lean modules, and back again."""
    before = model.config._attn_implementation
    if before == NAME:
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        with kernels_for(model.device).lean(model):
            yield
    finally:
        model.set_attn_implementation(before)
