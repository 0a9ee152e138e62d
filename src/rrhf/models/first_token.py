"""Classifiers that read one token: the last layer is computed for that token alone.

The heads of BERT's family read the first token's last state. Of all other tokens the last layer then needs keys and
values, no more: of the 12 h² products a token and layer costs, 10 h² fall away in the last of L layers, and its
attention but for one query. Layers are recognised by what they contain and by their numbers, never by name; that the
head reads nothing else is tried, with NaN in the other tokens' states.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LAST = "_rrhf_last_layer"  # the attribute in which a model carries its last layer, or None: what the checks found


@contextlib.contextmanager
def first_token_alone(model: nn.Module) -> Iterator[None]:
    """While it lasts ``model``, a classifier in evaluation mode, gives its logits without what they do not read.

    Nothing happens while gradients are taken, and for models whose last layer or head the checks do not know.
    """
    layer = None if model.training or torch.is_grad_enabled() else _last_layer(model)
    if layer is None or "forward" in vars(layer):
        yield
        return
    layer.forward = types.MethodType(_first_of, layer)
    try:
        yield
    finally:
        vars(layer).pop("forward", None)


def _first_of(layer: Any, hidden: Tensor, mask: Tensor | None = None, *others: Any, **options: Any) -> Tensor:
    """A layer's result for the first token, [B, 1, hidden_size], of ``hidden`` [B, L, hidden_size]."""
    if (mask is not None and mask.dim() != 4) or any(other is not None for other in (*others, *options.values())):
        result: Tensor = type(layer).forward(layer, hidden, mask, *others, **options)
        return result
    attention = layer.attention.self
    first = hidden[:, :1]

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)

    read = nn.functional.scaled_dot_product_attention(
        heads(attention.query(first)),
        heads(attention.key(hidden)),
        heads(attention.value(hidden)),
        attn_mask=None if mask is None else mask[:, :, :1],
        scale=attention.scaling,
    )
    attended = layer.attention.output(read.transpose(1, 2).flatten(2), first)
    output: Tensor = layer.output(layer.intermediate(attended), attended)
    return output


def _last_layer(model: nn.Module) -> Any:
    """The layer that may be computed for the first token alone; None where there is none. Looked for once."""
    if _LAST not in vars(model):
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and _is_layer(m[-1])]
        layer = stacks[0][-1] if len(stacks) == 1 else None
        known = layer is not None and _equal(layer) and _reads_first(model, layer)
        object.__setattr__(model, _LAST, layer if known else None)  # not as one of its modules
    return vars(model)[_LAST]


def _is_layer(layer: Any) -> bool:
    attention = getattr(getattr(layer, "attention", None), "self", None)
    return (
        {name for name, _ in layer.named_children()} == {"attention", "intermediate", "output"}
        and {name for name, _ in layer.attention.named_children()} == {"self", "output"}
        and all(isinstance(getattr(attention, name, None), nn.Module) for name in ("query", "key", "value"))
        and all(hasattr(attention, name) for name in ("attention_head_size", "scaling"))
    )


@torch.no_grad()
def _equal(layer: nn.Module) -> bool:
    """Whether ``_first_of`` gives the layer's own numbers, tried in fp64 on random input with hidden columns."""
    try:
        probe: Any = copy.deepcopy(layer).double().eval()
        weight = probe.attention.self.query.weight
        generator = torch.Generator(weight.device).manual_seed(0)
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        hidden = torch.randn(2, 5, weight.shape[1], generator=generator, **options)
        mask = torch.zeros(2, 1, 5, 5, **options)
        mask[0, ..., 3:] = torch.finfo(weight.dtype).min
        return torch.allclose(probe(hidden, mask)[:, :1], _first_of(probe, hidden, mask), rtol=1e-4, atol=1e-5)
    except Exception:  # a layer that looks alike and is called otherwise is computed whole
        return False


@torch.no_grad()
def _reads_first(model: Any, layer: nn.Module) -> bool:
    """Whether the logits stay when the last states of all tokens but the first are NaN."""

    def spoil(_: Any, __: Any, states: Tensor) -> Tensor:
        return torch.cat([states[:, :1], torch.full_like(states[:, 1:], torch.nan)], dim=1)

    ids = torch.arange(4, device=model.device)[None]
    try:
        plain = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        hook = layer.register_forward_hook(spoil)
        try:
            spoilt = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        finally:
            hook.remove()
    except Exception:
        return False
    return torch.equal(plain, spoilt)
