"""Policy gradients relative to the record's other responses, over per-token log-probabilities.

ratio = π/π_old, π_old the policy that drew the responses. Both losses are means over the record's scored responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rrhf.losses.record import RankingSettings, RecordTensors, needs, scored

STD_FLOOR = 1e-4  # added to the standard deviation of a record's scores, as others do


def grpo_advantages(scores: Tensor) -> Tensor:
    """A_i = (r_i − r̄) / (std + ``STD_FLOOR``) over the scored responses, std with n − 1; 0 where there is one, or none.

    Args:
        scores: Tensor of shape (k,), NaN where unscored.

    Returns:
        Tensor of shape (k,), 0 where unscored.
    """
    known = scores[scored(scores)]
    if len(known) < 2:
        return torch.zeros_like(scores)
    return ((scores - known.mean()) / (known.std() + STD_FLOOR)).nan_to_num(0.0)


def rloo_advantages(scores: Tensor) -> Tensor:
    """A_i = r_i − mean of the other scored responses' r; 0 where there is none. As ``grpo_advantages``."""
    known = scores[scored(scores)]
    if len(known) < 2:
        return torch.zeros_like(scores)
    return (scores - (known.sum() - scores) / (len(known) - 1)).nan_to_num(0.0)


def clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(ratio·A, clip(ratio, 1 − ε, 1 + ε)·A), ε = ``clip``: the clipped surrogate of PPO (arXiv 1707.06347)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(π‖ρ) a token that is never negative: ρ/π − log(ρ/π) − 1. Both of shape (tokens,)."""
    difference = reference - logprobs
    return torch.exp(difference) - difference - 1


@needs("token_logprobs", "old_token_logprobs", token_kl="reference_token_logprobs")
def grpo(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """GRPO (arXiv 2402.03300): mean_i mean_t of − min(ratio·A_i, clip(ratio)·A_i) + token_kl·k3, A = (r − r̄)/std.

    The ratio is a token's, clipped to 1 ± ``clip_range``; every response weighs the same, whatever its length (the
    paper's form). k3 is ``k3`` to the reference.
    """
    now, old = _given(record.token_logprobs), _given(record.old_token_logprobs)
    advantages = grpo_advantages(record.scores)
    losses = []
    for i in torch.nonzero(scored(record.scores))[:, 0].tolist():
        loss = -clipped(torch.exp(now[i] - old[i]), advantages[i].to(now[i]), settings.clip_range)
        if settings.token_kl:
            loss = loss + settings.token_kl * k3(now[i], _given(record.reference_token_logprobs)[i])
        losses.append(loss.sum() / max(len(loss), 1))
    return torch.stack(losses).mean() if losses else record.sums.sum() * 0


@needs("token_logprobs", "old_token_logprobs", token_kl="reference_token_logprobs")
def rloo(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """RLOO (arXiv 2402.14740): mean_i of − min(ratio·A_i, clip(ratio)·A_i) + token_kl·Σ_t k3, A = r − r̄ of the others.

    The ratio is a response's, e^{Σ_t log π − log π_old}, clipped to 1 ± ``clip_range``; where π = π_old the gradient is
    that of REINFORCE with the other responses as the baseline. k3 is ``k3`` to the reference.
    """
    now, old = _given(record.token_logprobs), _given(record.old_token_logprobs)
    advantages = rloo_advantages(record.scores)
    losses = []
    for i in torch.nonzero(scored(record.scores))[:, 0].tolist():
        loss = -clipped(torch.exp((now[i] - old[i]).sum()), advantages[i].to(now[i]), settings.clip_range)
        if settings.token_kl:
            loss = loss + settings.token_kl * k3(now[i], _given(record.reference_token_logprobs)[i]).sum()
        losses.append(loss)
    return torch.stack(losses).mean() if losses else record.sums.sum() * 0


def _given(values: Sequence[Tensor] | None) -> Sequence[Tensor]:
    if values is None:
        raise ValueError("log-probabilities a token are None")
    return values
