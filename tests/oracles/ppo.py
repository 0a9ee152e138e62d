"""PPO as others compute it: a padded row a response, masks, loops over time, plain transformers and AdamW.

The arithmetic is that of OpenRLHF 0.11 (token-level losses, advantages normalised over the rollout, the score at the
last token), rewritten from its description. TRL's and summarize_from_feedback_details' differ where a response ended
before its limit: they put the score one token behind its end and give V a value there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Row = tuple[list[int], list[int]]  # query, response


@dataclass(frozen=True)
class Settings:
    beta: float
    gamma: float
    lam: float
    clip: float
    value_clip: float
    value_coefficient: float
    whiten_rewards: bool
    max_grad_norm: float


def forward(model: Any, head: nn.Linear, rows: Sequence[Row], value_model: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """log π of the responses' tokens, V before each of them and which are no padding, [R, T] each."""
    width = max(len(query) + len(response) for query, response in rows)
    longest = max(len(response) for _, response in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    seen = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (query, response) in enumerate(rows):
        ids[i, : len(query) + len(response)] = torch.tensor([*query, *response])
        seen[i, : len(query) + len(response)] = 1
    outputs = model(input_ids=ids, attention_mask=seen, output_hidden_states=True)
    states = outputs.hidden_states[-1]
    if value_model is not None:
        states = value_model(input_ids=ids, attention_mask=seen, output_hidden_states=True).hidden_states[-1]
    logprobs = torch.log_softmax(outputs.logits, dim=-1)
    p, v, mask = [], [], torch.zeros(len(rows), longest)
    for i, (query, response) in enumerate(rows):
        before = range(len(query) - 1, len(query) + len(response) - 1)
        pad = longest - len(response)
        tokens = torch.stack([logprobs[i, place, token] for place, token in zip(before, response, strict=True)])
        values = torch.stack([head(states[i, place])[0] for place in before])
        p.append(nn.functional.pad(tokens, (0, pad)))
        v.append(nn.functional.pad(values, (0, pad)))
        mask[i, : len(response)] = 1
    return torch.stack(p), torch.stack(v), mask


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def token_rewards(logprobs: Tensor, reference: Tensor, mask: Tensor, scores: Sequence[float], s: Settings) -> Tensor:
    """The penalties, and the scores at the last tokens, [R, T]."""
    rewards = -s.beta * (logprobs - reference) * mask
    for i, score in enumerate(scores):
        rewards[i, int(mask[i].sum()) - 1] += score
    if s.whiten_rewards:
        mean = masked_mean(rewards, mask)
        spread = torch.sqrt(masked_mean((rewards - mean) ** 2, mask))
        rewards = ((rewards - mean) / spread + mean) * mask
    return rewards


def mean_return(rewards: Tensor, mask: Tensor, s: Settings) -> float:
    """What follows a token, discounted, the mean over all tokens."""
    found = []
    for i in range(len(rewards)):
        row = rewards[i, : int(mask[i].sum())].tolist()
        found += [sum(s.gamma ** (u - t) * row[u] for u in range(t, len(row))) for t in range(len(row))]
    return sum(found) / len(found)


def experience(rewards: Tensor, values: Tensor, mask: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """Normalised advantages and returns, [R, T]."""
    advantages = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        last = 0.0
        for t in reversed(range(int(mask[i].sum()))):
            following = float(values[i, t + 1]) if mask[i, t + 1 :].sum() else 0.0
            last = float(rewards[i, t]) + s.gamma * following - float(values[i, t]) + s.gamma * s.lam * last
            advantages[i, t] = last
    returns = (advantages + values) * mask
    mean = masked_mean(advantages, mask)
    spread = torch.sqrt(masked_mean((advantages - mean) ** 2, mask))
    return (advantages - mean) / spread * mask, returns


def losses(
    logprobs: Tensor, old: Tensor, values: Tensor, old_values: Tensor, advantages: Tensor, returns: Tensor,
    mask: Tensor, s: Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Policy and value loss, means over the tokens."""
    ratio = (logprobs - old).exp()
    kept = torch.min(ratio * advantages, ratio.clamp(1 - s.clip, 1 + s.clip) * advantages)
    moved = old_values + (values - old_values).clamp(-s.value_clip, s.value_clip)
    worse = torch.max((values - returns) ** 2, (moved - returns) ** 2)
    return -masked_mean(kept, mask), 0.5 * masked_mean(worse, mask)
