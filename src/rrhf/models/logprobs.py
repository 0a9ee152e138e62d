"""log P(token) under a model's output layer, its logits made block by block: never [tokens, vocabulary] at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rrhf.models.kernels.choice import kernels_for

KEPT_BYTES = 1 << 28  # logits larger than this are made again in the backward pass, whoever asks to keep them


class _TokenLogprobs(torch.autograd.Function):
    """log P(target | hidden) for every row, a block of rows and of the vocabulary at a time in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        keep: bool,
    ) -> Tensor:
        kernels = kernels_for(hidden.device)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        chosen = torch.zeros(len(targets), dtype=dtype, device=hidden.device)
        partitions = torch.full_like(chosen, -torch.inf)  # log Σ exp(logits), over the columns so far
        kept: list[Tensor] = []
        for rows, tokens in kernels.logit_tiles(len(targets), len(weight)):
            raw = kernels.linear(hidden[rows], weight[tokens], None if bias is None else bias[tokens])
            logits = _shaped(raw, scale, softcap, spare=not keep)
            if keep:
                kept.append(raw)
            inside, column = _columns(targets[rows], tokens)
            chosen[rows] += logits.gather(1, column).squeeze(1) * inside
            highest = logits.amax(dim=-1, keepdim=True)
            total = kernels.exp_less_(logits, highest).sum(dim=-1, keepdim=True).log_().add_(highest)
            torch.logaddexp(partitions[rows], total[:, 0], out=partitions[rows])
        ctx.save_for_backward(hidden, weight, bias, targets, partitions)
        ctx.scale, ctx.softcap, ctx.kept = scale, softcap, kept
        return chosen - partitions

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, partitions = ctx.saved_tensors
        kernels = kernels_for(hidden.device)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # ∂ log P(target) / ∂ logit = [is target] − P(token); a row's own factor can wait until the products are made
        outer = gradients[0].to(partitions.dtype).mul(-ctx.scale)[:, None]
        weighted = (hidden * outer).to(hidden.dtype) if need_weight else hidden
        d_hidden = torch.zeros_like(hidden, dtype=partitions.dtype) if need_hidden else None
        d_weight = (torch.empty_like if len(targets) else torch.zeros_like)(weight) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=partitions.dtype) if need_bias else None
        kept, ctx.kept = iter(ctx.kept), []  # a second backward pass over the same graph makes them again
        for rows, tokens in kernels.logit_tiles(len(targets), len(weight)):
            raw = next(kept, None)
            if raw is None:
                raw = kernels.linear(hidden[rows], weight[tokens], None if bias is None else bias[tokens])
            logits = _shaped(raw, ctx.scale, ctx.softcap, spare=True)
            inside, column = _columns(targets[rows], tokens)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
            d_logits = kernels.exp_less_(logits, partitions[rows, None])
            d_logits.scatter_add_(1, column, -inside[:, None].to(d_logits.dtype))
            if slope is not None:
                d_logits *= slope
            if d_bias is not None:
                d_bias[tokens] += (d_logits * outer[rows]).sum(dim=0)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] += kernels.matmul(d_logits, weight[tokens])
            if d_weight is not None:
                if rows.start:
                    d_weight[tokens] = kernels.addmm(d_weight[tokens], d_logits.t(), weighted[rows])
                else:
                    kernels.matmul(d_logits.t(), weighted[rows], out=d_weight[tokens])
        return (
            None if d_hidden is None else d_hidden.mul_(outer).to(hidden.dtype),
            d_weight,
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _columns(ids: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
    """Which ids lie in the vocabulary's part ``tokens`` [n], and in which of its columns (0 for the others) [n, 1]."""
    inside = (ids >= tokens.start) & (ids < tokens.stop)
    return inside, ((ids - tokens.start) * inside)[:, None]


def _shaped(raw: Tensor, scale: float, softcap: float | None, spare: bool) -> Tensor:
    """The output layer's result as logits in fp32 (fp64), in a tensor of its own unless ``raw`` is to ``spare``."""
    logits = raw.to(torch.float64 if raw.dtype == torch.float64 else torch.float32, copy=not spare)
    if scale != 1.0:
        logits = logits.mul_(scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _logit_shape(model: PreTrainedModel) -> tuple[float, float | None]:
    """What a model does to its output layer's result: a factor (Cohere, Granite) and a soft cap (Gemma 2)."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


def output_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [N, V] of last hidden states [N, hidden_size].

    In the output layer's type, and without autograd in fp32 where the device can (``Kernels.logits``): rounded to
    bfloat16, neighbouring logits would be equal.
    """
    scale, softcap = _logit_shape(model)
    head = model.get_output_embeddings()
    if not torch.is_grad_enabled() and _is_plain(head, hidden):
        logits = kernels_for(hidden.device).logits(hidden, head.weight, head.bias)
    else:
        logits = head(hidden)
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _is_plain(head: nn.Module, hidden: Tensor) -> bool:
    """Whether the output layer is one product with weights that lie, whole and in one type, beside ``hidden``."""
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return False
    here = head.weight.device == hidden.device and head.weight.dtype == hidden.dtype
    return here and not torch.is_autocast_enabled(hidden.device.type)


def token_logprobs(model: PreTrainedModel, hidden: Tensor, targets: Tensor, keep_logits: bool = False) -> Tensor:
    """log P(target) under the model's output layer, in fp32 (fp64 for a model in fp64).

    Args:
        hidden: the last hidden states, Tensor of shape (N, hidden_size).
        targets: token ids, Tensor of shape (N,).
        keep_logits: keep them for the backward pass, up to ``KEPT_BYTES``, instead of making them twice.

    Returns:
        Tensor of shape (N,).
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        elif hidden.dtype != weight.dtype:
            hidden = hidden.to(weight.dtype)
        keep = keep_logits and torch.is_grad_enabled()
        keep = keep and len(targets) * weight.shape[0] * weight.element_size() <= KEPT_BYTES
        rows, spare = len(targets), kernels_for(hidden.device).spare_rows(len(targets))
        hidden, targets = nn.functional.pad(hidden, (0, 0, 0, spare)), nn.functional.pad(targets, (0, spare))
        logprobs: Tensor = _TokenLogprobs.apply(hidden, weight, bias, targets, *_logit_shape(model), keep)
        return logprobs[:rows]

    def chunk(part: Tensor, ids: Tensor) -> Tensor:  # an output layer with an adapter in it
        return torch.log_softmax(output_logits(model, part).float(), dim=-1).gather(1, ids[:, None])[:, 0]

    vocabulary = model.config.get_text_config().vocab_size
    rows = kernels_for(hidden.device).logit_rows(vocabulary)
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(chunk, part, ids, use_reentrant=False) for part, ids in pieces])
