"""Losses against a reference model ρ, of the implicit rewards β·(log π(y|x) − log ρ(y|x)) (DPO, arXiv 2305.18290).

β is ``dpo_beta``. The reference's sums come with the records: they are computed once, before training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rrhf.losses.lists import plackett_luce
from rrhf.losses.pairs import Pairs, weighted_pairs
from rrhf.losses.record import (
    RankingSettings,
    RecordTensors,
    beside_the_mean,
    best_response,
    needs,
    normalised_logprobs,
    relevance,
    scored,
)

DPO_PAIRS = ("all", "best")


def log_ratios(record: RecordTensors) -> Tensor:
    """log π(y_i|x) − log ρ(y_i|x), Tensor of shape (k,).

    Raises:
        ValueError: the record has no ``reference_sums``.
    """
    if record.reference_sums is None:
        raise ValueError("reference_sums is None")
    return record.sums - record.reference_sums.to(record.sums)


def chosen_pairs(record: RecordTensors, settings: RankingSettings) -> Pairs:
    """The pairs that ``dpo_pairs`` names: "all", or "best", those with the best response (Eq. 3) against another."""
    pairs = weighted_pairs(record, settings)
    if settings.dpo_pairs == "all":
        return pairs
    best = best_response(record.scores)
    return Pairs(*(column[(pairs.worse == best) | (pairs.better == best)] for column in pairs))


@needs("reference_sums")
def dpo(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """DPO (arXiv 2305.18290): Σ_{r_i < r_j} − log σ(β·(h_j − h_i)), h = log π/ρ of the sums, β = dpo_beta.

    Over all pairs, or with ``dpo_pairs`` "best" over those of the best response with each other one.
    """
    worse, better, weights = chosen_pairs(record, settings)
    h = log_ratios(record)
    return -(weights * torch.nn.functional.logsigmoid(settings.dpo_beta * (h[better] - h[worse]))).sum()


@needs("reference_sums")
def ipo(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """IPO (arXiv 2310.12036): Σ_{r_i < r_j} (h_j − h_i − 1/(2β))², h = log π/ρ a token, β = dpo_beta (its τ).

    Pairs as in ``dpo``. h is divided by the length as in Eq. 1, which the paper's authors do and its formula does not
    say; ``length_exponent`` 0 gives the formula.
    """
    worse, better, weights = chosen_pairs(record, settings)
    h = normalised_logprobs(log_ratios(record), record.lengths, settings.length_exponent)
    return (weights * (h[better] - h[worse] - 1 / (2 * settings.dpo_beta)).square()).sum()


@needs("reference_sums", "batch_kl")
def kto(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """KTO (arXiv 2402.01306): mean_i of 1 − σ(±β·(h_i − z)), + where r_i is above the record's mean, z the batch's KL.

    h = log π/ρ of the sums, β = dpo_beta. Responses at the mean take part in nothing; both kinds weigh 1.

    Departure: z = max(0, mean of h) is over the scored responses of the step as they are; the paper draws it from
    responses to other queries, which would take a forward pass of their own.
    """
    h, side = log_ratios(record), beside_the_mean(record.scores).to(record.sums)
    if record.batch_kl is None:
        raise ValueError("batch_kl is None")
    losses = torch.sigmoid(-settings.dpo_beta * side * (h - record.batch_kl.to(h)))
    return losses[side != 0].sum() / (side != 0).sum().clamp(min=1)


@needs("reference_sums")
def dpo_listmle(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """DPO under Plackett-Luce (arXiv 2305.18290, appendix A.3): listmle of β·h, h = log π/ρ of the sums."""
    return plackett_luce(settings.dpo_beta * log_ratios(record), record.scores, settings.ties)


@needs("reference_sums")
def lambda_loss(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """LiPO-λ (arXiv 2402.01878): Σ_{r_i < r_j} Δ_ij·log(1 + e^{−(s_j − s_i)}), s = β·log π/ρ, Δ what a swap costs DCG.

    Δ_ij = |G_i − G_j|·|1/D_i − 1/D_j|, G = 2^ψ − 1 the gains, D = log(1 + τ), τ the rank by s among the scored
    responses (no gradient; of equal s the first stands first). ψ is ``relevance`` with ``score_scale``: the paper's
    labels are such shares of won comparisons, of a pairwise reward model.
    """
    worse, better, weights = weighted_pairs(record, settings)
    s, known = settings.dpo_beta * log_ratios(record), scored(record.scores)
    gains, discounts = torch.zeros_like(s), torch.zeros_like(s)
    gains[known] = torch.exp2(relevance(record.scores[known], settings.score_scale)).sub(1).to(s)
    order = torch.argsort(s.detach().masked_fill(~known, -torch.inf), descending=True, stable=True)
    discounts[order] = 1 / torch.log(torch.arange(2, len(s) + 2).to(s))
    swap = (gains[better] - gains[worse]).abs() * (discounts[better] - discounts[worse]).abs()
    return (weights * swap * torch.nn.functional.softplus(s[worse] - s[better])).sum()


@needs("reference_sums")
def swepo(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """SWEPO (arXiv 2412.04628): − log( Σ_{r_i > r̄} w_i e^{s_i} / Σ_i w_i e^{s_i} ), s = β·log π/ρ, w = e^{α|r − r̄|}.

    r̄ is the mean of the record's scores, α = ``score_scale``.
    """
    known = scored(record.scores)
    side, scores = beside_the_mean(record.scores)[known], record.scores[known]
    s = settings.dpo_beta * log_ratios(record)[known]
    if not bool((side > 0).any()):
        return s.sum() * 0
    weighted = s + settings.score_scale * (scores - scores.mean()).abs().to(s)
    return weighted.logsumexp(dim=0) - weighted[side > 0].logsumexp(dim=0)
