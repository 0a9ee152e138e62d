"""The tokens that may be drawn, by another model that reads the same text: NLPO's mask (Ramamurthy et al. 2022).

At each step the mask M is the smallest set of the other model's likeliest tokens with the probability ``top_p``
together; the policy π is renormalised on it:

    π_M(v | s) = π(v | s) / Σ_{u ∈ M(s)} π(u | s) for v in M(s), and 0 elsewhere        (arXiv 2210.01241, section 4)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rrhf.models.kernels.choice import kernels_for
from rrhf.models.logprobs import output_logits
from rrhf.sampling.stepping import Advance, FiniteCheck, Stepper

MASKED = -1.0e9  # a masked token's logit: its weight e^x is 0, and no arithmetic on it gives what is no number


@dataclass(frozen=True)
class Nucleus:
    """``model``: whose likeliest tokens may be drawn, in evaluation mode. ``top_p``: their probability together."""

    model: PreTrainedModel
    top_p: float


def in_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Which tokens are in the smallest set of likeliest ones with the probability ``top_p``; of equals the lower first.

    Args:
        logits: Tensor of shape (R, V).

    Returns:
        Tensor of shape (R, V), bool; never an empty row.
    """
    values, tokens = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
    weights = torch.softmax(values, dim=-1).to(kernels_for(logits.device).fp64_device(logits.device)).double()
    before = weights.cumsum(dim=-1) - weights
    kept = (before < top_p * weights.sum(dim=-1, keepdim=True)).to(logits.device)
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, tokens, kept)


class NucleusStepper:
    """Two models in step: the logits of the first, those of tokens outside the second one's nucleus ``MASKED``."""

    def __init__(self, stepper: Stepper, masking: Stepper, top_p: float) -> None:
        self.stepper, self.masking, self.top_p = stepper, masking, top_p

    @property
    def finite(self) -> FiniteCheck:
        return self.stepper.finite

    def prefill(self) -> Tensor:
        return self._masked(self.stepper.prefill(), self.masking.prefill())

    def step(self, advance: Advance) -> Tensor:
        return self._masked(self.stepper.step(advance), self.masking.step(advance))

    def _masked(self, logits: Tensor, masking: Tensor) -> Tensor:
        return logits.masked_fill(~in_nucleus(masking, self.top_p), MASKED)


# --- the same mask for tokens that were drawn ------------------------------------------------------------------------


def nucleus_of(model: PreTrainedModel, hidden: Tensor, targets: Tensor, top_p: float) -> np.ndarray:
    """The masks of N drawn tokens, a bit a token of the vocabulary.

    Args:
        model: the masking model; ``hidden`` are its last hidden states that predict the tokens, (N, hidden_size).
        targets: the drawn tokens, (N,). They are in the mask, also where a pass rounds otherwise than decoding did.

    Returns:
        Array of shape (N, ⌈V / 8⌉), uint8.
    """
    masks = []
    rows = kernels_for(hidden.device).logit_rows(model.config.get_text_config().vocab_size)
    for part, drawn in zip(hidden.split(rows), targets.split(rows), strict=True):
        mask = in_nucleus(output_logits(model, part), top_p).scatter_(1, drawn[:, None], True)
        masks.append(np.packbits(mask.cpu().numpy(), axis=1))
    return np.concatenate(masks)


def log_mass(model: PreTrainedModel, hidden: Tensor, masks: np.ndarray) -> Tensor:
    """log Σ_{u ∈ M} π(u | s) of N tokens, with a graph: log π_M is log π less this.

    Args:
        model: the policy; ``hidden`` are its last hidden states that predict the tokens, (N, hidden_size).
        masks: of ``nucleus_of``, (N, ⌈V / 8⌉).

    Returns:
        Tensor of shape (N,), fp32.
    """

    def chunk(part: Tensor, mask: Tensor) -> Tensor:
        logits = output_logits(model, part).float()
        return logits.masked_fill(~mask, MASKED).logsumexp(dim=-1) - logits.logsumexp(dim=-1)

    vocabulary = model.get_output_embeddings().weight.shape[0]
    rows = kernels_for(hidden.device).logit_rows(vocabulary)
    pieces = []
    for start in range(0, len(hidden), rows):
        mask = torch.from_numpy(np.unpackbits(masks[start : start + rows], axis=1, count=vocabulary)).bool()
        part = hidden[start : start + rows]
        pieces.append(checkpoint(chunk, part, mask.to(hidden.device), use_reentrant=False))
    return torch.cat(pieces)
