"""What all passes over responses have in common: their result, the model inside a wrapper, a router's loss."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rrhf.common.errors import UserError


@dataclass
class Logprobs:
    """What a pass over records gives, for all R responses of the records in order.

    ``sums``: Σ_t log P(y_t | …), [R], fp32 with a graph. ``lengths``: ‖y‖, [R]. ``router_loss``: the auxiliary loss of
    a mixture of experts, where its configuration asks for it. ``tokens``: rows of the forward pass.
    ``token_logprobs``: log P(y_t | …) of the N = Σ ‖y‖ response tokens in order, [N]. ``hidden``: where asked for, the
    last hidden states that predict them, [N, hidden_size].
    """

    sums: Tensor
    lengths: Tensor
    tokens: int
    router_loss: Tensor | None = None
    token_logprobs: Tensor | None = None
    hidden: Tensor | None = None


def causal_lm(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model below its output layer.

    transformers goes by the names of attributes, and gives Llama 4's text model itself: then it is the model inside.
    """
    module: nn.Module = model.get_decoder()
    if module is model:
        module = next(child for child in model.children() if isinstance(child, PreTrainedModel))
    return module


def router_options(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config()
    return {"output_router_logits": True} if getattr(config, "output_router_logits", False) else {}


def router_loss(model: PreTrainedModel, outputs: Any) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, weighted as its configuration says.

    Raises:
        UserError: its configuration asks for one, and transformers has none for the family.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    loss = getattr(outputs, "aux_loss", None)
    if loss is None:
        balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        experts = (
            getattr(model, "num_experts", None) or getattr(config, "num_local_experts", None) or config.num_experts
        )
        if balance is None or getattr(outputs, "router_logits", None) is None:
            raise UserError(
                f"{type(model).__name__} asks for a router loss (output_router_logits), which cannot be computed for "
                "this family here: set output_router_logits to false in its config.json"
            )
        loss = balance(outputs.router_logits, experts, config.num_experts_per_tok)
    weight = config.aux_loss_coef if hasattr(config, "aux_loss_coef") else config.router_aux_loss_coef  # JetMoE's name
    return float(weight) * loss
