"""The terms of PPO's objective, as functions of tensors (Eq. 6 of arXiv 2304.05302).

A state s_t is a query and the response's tokens before y_t; an action is the token y_t. For a policy π, a frozen
reference ρ, a value function V and a reward R of whole responses:

    r_t = −β (log π(y_t | s_t) − log ρ(y_t | s_t)) + [t = T] R(x, y)
    δ_t = r_t + γ V(s_{t+1}) − V(s_t),   V = 0 behind the last token, also of a response that a limit cut
    Â_t = Σ_l (γλ)^l δ_{t+l},   G_t = Â_t + V(s_t)                       (GAE, arXiv 1506.02438; then whitened)
    V at first: the mean of G_t over the first rollout, with λ = 1 and V = 0
    L_π = E max(−u_t Â_t, −clip(u_t, 1 − ε, 1 + ε) Â_t),   u_t = π(y_t | s_t) / π_old(y_t | s_t)          (Eq. 6)
    L_V = ½ E max((V − G_t)², (clip(V, V_old − ε_V, V_old + ε_V) − G_t)²)

E is the mean over the tokens of an optimiser step. Tensors of tokens are flat, [N], the responses of a rollout behind
each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def token_rewards(logprobs: Tensor, reference: Tensor, scores: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """r_t: the penalty of every token, and a response's score at its last one.

    Args:
        logprobs, reference: log π(y_t | s_t) and log ρ(y_t | s_t), Tensors of shape (N,).
        scores: R(x, y) of the responses, Tensor of shape (R,).
        lengths: tokens of each, at least 1, Tensor of shape (R,).
        beta: β.
    """
    return (-beta * (logprobs - reference)).index_add(0, lengths.cumsum(0) - 1, scores)


def advantages(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """Â_t by generalised advantage estimation, response by response.

    Args:
        rewards, values: r_t and V(s_t), Tensors of shape (N,).
        lengths: tokens of each response, Tensor of shape (R,).
        gamma, lam: γ and λ.

    Returns:
        Tensor of shape (N,).
    """
    inside = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # [R, T]
    r, v = (torch.zeros(inside.shape, dtype=x.dtype).masked_scatter(inside, x) for x in (rewards, values))
    v = nn.functional.pad(v, (0, 1))
    out, running = torch.zeros_like(r), r.new_zeros(len(r))
    for t in reversed(range(r.shape[1])):  # behind a response's end everything is 0
        running = r[:, t] + gamma * v[:, t + 1] - v[:, t] + gamma * lam * running
        out[:, t] = running
    return out[inside]


def whitened(x: Tensor, shift: bool = True) -> Tensor:
    """x scaled to variance 1 (of a population), and with ``shift`` to mean 0."""
    mean, variance = x.mean(), x.var(unbiased=False)
    return (x - mean) * torch.rsqrt(variance + 1e-8) + (0.0 if shift else mean)


def surrogate(logprobs: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Eq. 6 a token, and which tokens the clip holds back; Tensors of shape (N,)."""
    ratio = torch.exp(logprobs - old)
    free, held = -ratio * advantage, -ratio.clamp(1 - clip, 1 + clip) * advantage
    return torch.maximum(free, held), held > free


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """L_V a token, Tensor of shape (N,)."""
    held = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − Var(G − V) / Var(G): 1 where V knows the returns, 0 where it knows their mean alone, or all are equal."""
    variance = float(returns.var(unbiased=False))
    return 1 - float((returns - values).var(unbiased=False)) / variance if variance > 0 else 0.0
