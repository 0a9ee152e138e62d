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
from rrhf.models.kernels.reference import additive, product_attention

NAME = "rrhf"

# What attention modules may pass beside the tensors: these are part of an AttentionCall …
_IMPLEMENTED = {"sliding_window", "softcap", "s_aux"}
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
    """Who sees whom in one forward call.

    ``position_ids``: Tensor of shape (1, T); the column in the row is another number.
    """

    @property
    def position_ids(self) -> Tensor: ...

    def attend(self, layer: int, call: AttentionCall) -> Tensor:
        """Attend from the queries [1, H, T, D] of ``call`` to its keys [1, H_kv, T, D]; returns [1, T, H, D].

        Contiguous where all of it is made here: some models take a view of it.
        """
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
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if rrhf_layout is None and softcap is None and sinks is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    unknown = [name for name, value in options.items() if value is not None and name not in _KNOWN]
    if unknown and (unknown != ["is_causal"] or not options["is_causal"]):
        raise NotImplementedError(f"attention option {', '.join(unknown)}")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    call = AttentionCall(
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=options.get("sliding_window"),
        softcap=softcap,
        dropout=dropout,
        chunk=_chunk(module, layer),
        sinks=None if sinks is None else sinks[:, None],
    )
    if rrhf_layout is None:  # sdpa knows neither
        return product_attention(call, _additive(attention_mask, call)).transpose(1, 2).contiguous(), None
    return rrhf_layout.attend(layer, _scaled_by_position(module, call, rrhf_layout)), None


def _scaled_by_position(module: Any, call: AttentionCall, layout: Layout) -> AttentionCall:
    """Llama 4's layers without rotary embeddings scale a query by how far back it may look, which they take to be its
    column in the row; here by its position instead."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return call

    def scale(positions: Tensor) -> Tensor:
        return torch.log1p(torch.floor((positions + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    columns = torch.arange(call.query.shape[2], device=call.query.device)
    factor = scale(layout.position_ids[0]) / scale(columns)
    return call.over((call.query * factor[:, None]).to(call.query.dtype), call.key, call.value)


def _chunk(module: nn.Module, layer: int) -> int | None:
    """The chunk of positions within which a layer attends; transformers tells it by the mask alone."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    return config.attention_chunk_size if kinds and kinds[layer] == "chunked_attention" else None  # type: ignore[union-attr]


def _additive(mask: Tensor | None, call: AttentionCall) -> Tensor:
    """transformers' mask of a plain call, bool or none where it is causal, as one to add to scores."""
    if mask is None:
        length, columns = call.query.shape[2], call.key.shape[2]
        mask = torch.ones(length, columns, dtype=torch.bool, device=call.query.device).tril(columns - length)
    return additive(mask, call.query.dtype) if mask.dtype == torch.bool else mask


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
