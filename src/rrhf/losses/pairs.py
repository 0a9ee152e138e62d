"""Losses of pairs: Eq. 2 and its relatives, L = Σ w_ij ℓ(p_i, p_j), and what equal scores do (``--ties``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from rrhf.common.errors import UserError, nearest
from rrhf.common.scores import SCORE_TOLERANCE
from rrhf.losses.record import RankingSettings, RecordTensors, below, ranks, scored


def leave_ties(scores: Tensor, least: float) -> Tensor:
    """equal scores are no pair (Eq. 2)."""
    return below(scores).double()


def halve_ties(scores: Tensor, least: float) -> Tensor:
    """a pair of equal scores counts half in each direction, which pulls its p together (arXiv 1706.03741)."""
    tied = scored(scores)[:, None] & scored(scores)[None, :] & ~below(scores) & ~below(scores).t()
    return below(scores).double() + 0.5 * tied.fill_diagonal_(False)


def widen_ties(scores: Tensor, least: float) -> Tensor:
    """scores nearer than E are equal and no pair: r_j counts above r_i from r_i + E on, each pair by itself."""
    low, high = scores[:, None], scores[None, :]
    rounding = SCORE_TOLERANCE * torch.maximum(low.abs(), high.abs()).clamp(min=least)
    return (below(scores) & (high - low >= least - rounding)).double()


TIES: dict[str, Callable[[Tensor, float], Tensor]] = {"none": leave_ties, "half": halve_ties, "margin:E": widen_ties}


@cache
def tie_rule(ties: str) -> tuple[Callable[[Tensor, float], Tensor], float]:
    """The function of ``TIES`` that ``--ties`` names, and its E, which is 0 where it has none.

    Raises:
        UserError: there is no such rule, or E is no number that is not negative.
    """
    name, _, number = ties.partition(":")
    known = {rule.partition(":")[0]: rule for rule in TIES}
    if name not in known:
        raise UserError(nearest(name, known))
    if ":" not in known[name]:
        if number:
            raise UserError(f"{name} takes no number")
        return TIES[name], 0.0
    try:
        least = float(number)
    except ValueError:
        least = math.nan
    if not (math.isfinite(least) and least >= 0):
        raise UserError(f"write {known[name]} with a number E that is not negative, in units of the scores")
    return TIES[known[name]], least


def pair_weights(scores: Tensor, ties: str = "none") -> Tensor:
    """[i, j]: how much "y_i is worse than y_j" counts, by the rule ``ties`` (a line of ``TIES``).

    1 for an ordered pair; ½ both at [i, j] and at [j, i] for a tie that is pulled together; else 0, as for unscored
    responses and on the diagonal.

    Args:
        scores: Tensor of shape (k,), NaN where unscored.
        ties: "none", "half" or "margin:E", as in ``LossSettings``.

    Returns:
        Tensor of shape (k, k), float64.
    """
    rule, least = tie_rule(ties)
    return rule(scores, least)


def ordered_pairs(scores: Tensor, ties: str = "none") -> tuple[Tensor, Tensor]:
    """Indices (i, j) of every pair with r_i < r_j. Equal scores (``score_levels``) and unscored responses are no pair.

    Args:
        scores: Tensor of shape (k,), NaN where unscored.
        ties: with "margin:E" scores nearer than E are equal, too.

    Returns:
        Two tensors of shape (pairs,): the worse responses i and the better ones j.
    """
    worse, better = torch.nonzero(pair_weights(scores, ties) == 1, as_tuple=True)
    return worse, better


class Pairs(NamedTuple):
    """Pairs of responses and what they weigh: three tensors of shape (pairs,), the last one in the type of p."""

    worse: Tensor
    better: Tensor
    weights: Tensor


def weighted_pairs(record: RecordTensors, settings: RankingSettings) -> Pairs:
    """The pairs of a pairwise loss L = Σ w_ij ℓ(p_i, p_j), where ℓ is the loss of "y_i is worse than y_j".

    w is ``pair_weights`` under ``settings.ties``. A tie under "half" stands here twice, as (i, j) and as (j, i) with
    weight ½ each: (ℓ(p_i, p_j) + ℓ(p_j, p_i)) / 2 is least where p_i = p_j, for every convex ℓ of the difference. For
    the hinge it is |p_i − p_j| / 2, for the logistic loss the cross-entropy against the even odds ½, as Christiano et
    al. (arXiv 1706.03741) and RankNet (Burges et al. 2005) take equal preferences.
    """
    weights = pair_weights(record.scores, settings.ties)
    worse, better = torch.nonzero(weights, as_tuple=True)
    return Pairs(worse, better, weights[worse, better].to(record.logprobs))


def hinge(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """Eq. 2: L_rank = Σ_{r_i < r_j} max(0, p_i − p_j), without a margin.

    Returns:
        Scalar; 0 (with a graph) where no pair is ordered. So do all ranking losses.
    """
    worse, better, weights = weighted_pairs(record, settings)
    return (weights * (record.logprobs[worse] - record.logprobs[better]).clamp(min=0)).sum()


def rank_margin(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """BRIO (arXiv 2203.16804): Σ_{r_i < r_j} max(0, p_i − p_j + λ_ij), λ_ij = (rank_i − rank_j)·margin."""
    p = record.logprobs
    worse, better, weights = weighted_pairs(record, settings)
    rank = ranks(record.scores).to(p.dtype)
    return (weights * (p[worse] - p[better] + settings.margin * (rank[worse] - rank[better])).clamp(min=0)).sum()


def constant_margin(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """SLiC (arXiv 2305.10425): Σ_{r_i < r_j} max(0, p_i − p_j + margin)."""
    worse, better, weights = weighted_pairs(record, settings)
    return (weights * (record.logprobs[worse] - record.logprobs[better] + settings.margin).clamp(min=0)).sum()


def logistic(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """Bradley-Terry on p: Σ_{r_i < r_j} − log σ(scale·(p_j − p_i) − margin); SimPO (arXiv 2405.14734) for lists."""
    worse, better, weights = weighted_pairs(record, settings)
    difference = settings.logprob_scale * (record.logprobs[better] - record.logprobs[worse])
    return -(weights * torch.nn.functional.logsigmoid(difference - settings.margin)).sum()


def simpo(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """SimPO (arXiv 2405.14734): logistic with β = logprob_scale 2 and γ = margin 1, and no cross-entropy, by default.

    Σ_{r_i < r_j} − log σ(β·(p_j − p_i) − γ). The paper's other settings have β 2 to 10 and γ 0.3 to 1.6.
    """
    return logistic(record, settings)


def cpo(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """CPO (arXiv 2401.08417): Σ_{r_i < r_j} − log σ(β·(s_j − s_i)), s the log-probability sums, β = dpo_beta.

    DPO under a uniform reference. Its likelihood term is ``sft_weight`` with ``sft_reduction`` "mean", by default here.
    """
    worse, better, weights = weighted_pairs(record, settings)
    difference = settings.dpo_beta * (record.sums[better] - record.sums[worse])
    return -(weights * torch.nn.functional.logsigmoid(difference)).sum()


CERTAIN = -1e-6  # the highest p that has odds: a response of probability 1 would have infinite ones


def log_odds(logprobs: Tensor) -> Tensor:
    """log( P / (1 − P) ) of P = e^p; p counts as at most ``CERTAIN``. Tensor of the shape of ``logprobs``."""
    p = logprobs.clamp(max=CERTAIN)
    return p - torch.log(-torch.expm1(p))


def orpo(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """ORPO (arXiv 2403.07691): Σ_{r_i < r_j} − log σ(log odds_j − log odds_i), odds = e^p / (1 − e^p).

    λ of the paper is ``rank_weight`` (0.1 by default here); its likelihood term is ``sft_weight`` with
    ``sft_reduction`` "mean", by default here. Over the response alone, as the paper's formula has it.
    """
    worse, better, weights = weighted_pairs(record, settings)
    odds = log_odds(record.logprobs)
    return -(weights * torch.nn.functional.logsigmoid(odds[better] - odds[worse])).sum()
