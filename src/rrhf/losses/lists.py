"""Losses of whole lists of responses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rrhf.losses.pairs import pair_weights
from rrhf.losses.record import RankingSettings, RecordTensors, relevance, scored


def listmle(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """Plackett-Luce, as in PRO (arXiv 2306.17492): Σ_i − log( e^{s p_i} / (e^{s p_i} + Σ_{r_j < r_i} e^{s p_j}) ).

    Equal scores do not compete with each other; without ties this is ListMLE. s is ``logprob_scale``. Under
    ``ties`` "half" an equal y_j is half a rival: ½ e^{s p_j} in the sum.
    """
    return plackett_luce(settings.logprob_scale * record.logprobs, record.scores, settings.ties)


def plackett_luce(logits: Tensor, scores: Tensor, ties: str) -> Tensor:
    """Σ_i − log( e^{l_i} / (e^{l_i} + Σ_{r_j < r_i} e^{l_j}) ) of logits l; see ``listmle``. Both of shape (k,)."""
    counts = pair_weights(scores, ties).t().to(logits) + torch.diag(scored(scores)).to(logits)
    rivals = (logits[None, :] + counts.log()).masked_fill(counts == 0, -torch.inf)
    return (rivals[scored(scores)].logsumexp(dim=1) - logits[scored(scores)]).sum()


def ndcg(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """diffNDCG (arXiv 2410.18127): 1 − NDCG of the labels as a differentiable sorting network orders them by s·p.

    NDCG = Σ_j g_(j) / log2(1 + j) over its best value, g = 2^ψ − 1 the gains, g_(j) = Σ_i P_ji g_i the gain expected at
    place j, P the soft permutation of ``soft_sort``, s = ``logprob_scale``.

    Departures: the paper's margin between ranks in the policy's score (its Adaptive Rank Policy Score) is left out, p
    is that of Eq. 1; the labels ψ are ``relevance`` of the scores with ``score_scale``.
    """
    known = scored(record.scores)
    logits = settings.logprob_scale * record.logprobs[known]
    if len(logits) < 2:
        return logits.sum() * 0
    gains = torch.exp2(relevance(record.scores[known], settings.score_scale)).sub(1).to(logits)
    discounts = 1 / torch.log2(torch.arange(2, len(gains) + 2).to(logits))
    best = (gains.sort(descending=True).values * discounts).sum()
    return 1 - (soft_sort(logits) @ gains * discounts).sum() / best


def soft_sort(values: Tensor) -> Tensor:
    """The soft permutation that sorts ``values``, the largest first: an odd-even network of relaxed swaps.

    Neighbours a above b stay in place with the share α = 1/2 + arctan(a − b)/π and change places with 1 − α, in n
    layers (Petersen et al., arXiv 2203.09630; the Cauchy distribution's function keeps it monotonic).

    Args:
        values: Tensor of shape (n,).

    Returns:
        Tensor of shape (n, n), doubly stochastic: [j, i] is the share of element i at place j.
    """
    size = len(values)
    permutation = torch.eye(size, dtype=values.dtype)
    for layer in range(size):
        upper = torch.arange(layer % 2, size - 1, 2)
        stay = 0.5 + torch.arctan(values[upper] - values[upper + 1]) / math.pi
        shares = torch.zeros(size, dtype=values.dtype).index_put((torch.cat([upper, upper + 1]),), (1 - stay).repeat(2))
        swap = torch.arange(size).index_put((torch.cat([upper, upper + 1]),), torch.cat([upper + 1, upper]))
        values = (1 - shares) * values + shares * values[swap]
        permutation = (1 - shares)[:, None] * permutation + shares[:, None] * permutation[swap]
    return permutation


def lire(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """LIRE (arXiv 2405.13516): − Σ_j P_j·R_j, P = softmax(s·p) over the record's responses, R = softmax(r).

    s = ``logprob_scale`` is 1/T of the paper; r is multiplied by ``score_scale``. Less the mean of R, which moves no
    gradient: 0 where all scores are equal. Departure: the paper's sums of log-probabilities are ``length_exponent`` 0.
    """
    known = scored(record.scores)
    logits = settings.logprob_scale * record.logprobs[known]
    if not len(logits):
        return logits.sum()
    rewards = torch.softmax(settings.score_scale * record.scores[known], dim=0).to(logits)
    return -(torch.softmax(logits, dim=0) * (rewards - 1 / len(rewards))).sum()
