"""Whether FlexAttention gives what masked calls give on a model, forward and backward; where not, it is not taken."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrhf.models.kernels.choice import ask_for_flex, wants_flex
from rrhf.models.shared_prefix import forest_logprobs, lay_out
from rrhf.models.tokenization import EncodedRecord

# How far the two may be apart: nats a token, and a share of the norm of the gradient of the embedded tokens.
BOUNDS = {torch.float32: (1e-3, 1e-2), torch.float64: (1e-3, 1e-2)}
LOW_PRECISION_BOUNDS = (0.05, 0.1)


def check_flex(model: PreTrainedModel, record: EncodedRecord) -> None:
    """Let trees of a model that asks for FlexAttention go by masked calls, with a warning, unless both agree.

    Raises:
        torch.OutOfMemoryError: there is no room for a forward and a backward pass over ``record``.
    """
    if not wants_flex(model):
        return
    try:
        fault = _difference(model, record)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler raises, masked calls remain
        fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if fault is not None:
        ask_for_flex(model, False)
        warnings.warn(
            f"--attn_implementation flex is not taken ({fault}): trees go by torch's own attention", stacklevel=3
        )


def _difference(model: PreTrainedModel, record: EncodedRecord) -> str | None:
    p, gradient = _p_and_gradient(model, record, flex=False)
    other_p, other_gradient = _p_and_gradient(model, record, flex=True)
    p_bound, bound = BOUNDS.get(next(model.parameters()).dtype, LOW_PRECISION_BOUNDS)
    apart = float((other_p - p).abs().max())
    if not apart <= p_bound:
        return f"its log-probabilities differ by {apart:.2g} a token"
    share = float((other_gradient - gradient).norm() / gradient.norm())
    if not share <= bound:
        return f"its gradients differ by {100 * share:.2g} % of their norm"
    return None


def _p_and_gradient(model: PreTrainedModel, record: EncodedRecord, flex: bool) -> tuple[Tensor, Tensor]:
    """log P a token of each response, and the gradient of a weighted sum of them by the embedded tokens."""
    embeddings = model.get_input_embeddings()
    embedded: list[Tensor] = []

    def hook(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = embeddings.register_forward_hook(hook)
    try:
        with torch.enable_grad():
            logprobs = forest_logprobs(model, lay_out([record], embeddings.weight.device, flex))
            p = logprobs.sums / logprobs.lengths.clamp(min=1)
            total = (p * torch.linspace(-1, 2, len(p), device=p.device)).sum()
            (gradient,) = torch.autograd.grad(total, embedded)
    finally:
        handle.remove()
    return p.detach(), gradient.float()
