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

from rrhf.models.kernels.cpu.lean_modules import lean

NAME = "rrhf"

# What attention modules may pass beside the tensors that changes their result and that no layout implements.
_UNSUPPORTED = ("s_aux", "position_bias", "indexer")


class Layout(Protocol):
    """Who sees whom in one forward call."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        """Attend from ``query`` [1, H, T, D] to ``key``, ``value`` [1, H_kv, T, D]; returns [1, T, H, D]."""
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
    """The function registered with transformers' attention interface under the name ``rrhf``."""
    if rrhf_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise NotImplementedError(f"attention option {name}")
    output = rrhf_layout.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        dropout=dropout,
    )
    return output, None


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scaling · q kᵀ + mask) v, with ``softcap`` (Gemma 2) as c · tanh(· / c) before the mask.

    Args:
        query: Tensor of shape (B, H, L, D).
        key, value: Tensors of shape (B, H_kv, K, D); H is a multiple of H_kv (grouped queries).
        mask: additive, Tensor of shape (L, K) or (B, 1, L, K).

    Returns:
        Tensor of shape (B, H, L, D).
    """
    # On CPUs in bfloat16 torch's fused kernel takes twice as long as plain products do, its backward 2-3 times.
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if softcap is None and not plain:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    batch, heads, length, size = query.shape
    groups, columns = heads // key.shape[1], key.shape[2]
    # The heads of a group share keys: their rows stand below each other in one product.
    rows = query.reshape(batch * key.shape[1], groups * length, size)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    weights = torch.bmm(rows, keys.transpose(1, 2)).float().view(batch, -1, groups, length, columns) * scaling
    if softcap is not None:
        weights = softcap * torch.tanh(weights / softcap)
    weights = weights + (mask if mask.dim() == 2 else mask[:, :, None])
    weights = nn.functional.dropout(torch.softmax(weights, dim=-1).to(query.dtype), dropout)
    return torch.bmm(weights.view(len(rows), groups * length, columns), values).view(batch, heads, length, -1)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

# A mask that is already 4-D is passed through untouched, so no [T, T] mask is built that a layout would not read.
NO_MASK = torch.zeros(1, 1, 1, 1)


def takes_layouts(model: PreTrainedModel) -> bool:
    """Whether the model looks its attention up in transformers' interface (its numbers are checked elsewhere)."""
    return bool(model._can_set_attn_implementation())


@contextlib.contextmanager
def our_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch ``model`` to the ``rrhf`` attention, and on a CPU to lean modules, and back again."""
    before = model.config._attn_implementation
    if before == NAME:
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        with lean(model) if model.device.type == "cpu" else contextlib.nullcontext():
            yield
    finally:
        model.set_attn_implementation(before)
