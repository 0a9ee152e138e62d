"""The losses of RRHF (arXiv 2304.05302, Eq. 1-5) and other ranking losses: pure functions of one record's tensors.

Symbols: k responses y_i of one query x, with scores r_i (what the reward says) and log-probabilities
p_i (what the model says). ``logprob_sums`` is Σ_t log P_π(y_i,t | x, y_i,<t), ``lengths`` is ‖y_i‖ in tokens.

A ranking loss is a function ``f(record: RecordTensors, settings: LossSettings) -> Tensor`` (a scalar) and a line in
``RANKING_LOSSES``; the first line of its docstring describes it in ``--help`` and on model cards. One that reads a
field of ``RecordTensors`` that may be None says so with ``@needs``. Functions elsewhere are named as
``pkg.module:function``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from rrhf.common.errors import UserError, nearest
from rrhf.common.imports import load_function
from rrhf.common.scores import SCORE_TOLERANCE


@dataclass(frozen=True)
class RecordTensors:
    """What a ranking loss sees of one record: k responses of one query.

    Attributes:
        sums: Σ_t log P_π(y_i,t | x, y_i,<t), Tensor of shape (k,), with the graph.
        lengths: ‖y_i‖ in tokens, Tensor of shape (k,).
        scores: r, Tensor of shape (k,), NaN where unscored.
        logprobs: p of Eq. 1, Tensor of shape (k,), with the graph.
        reference_sums: ``sums`` under the reference model ρ, Tensor of shape (k,); given to losses that need it.
        token_logprobs: log P_π(y_i,t | x, y_i,<t), k tensors of shape (‖y_i‖,); given to losses that need them.
    """

    sums: Tensor
    lengths: Tensor
    scores: Tensor
    logprobs: Tensor
    reference_sums: Tensor | None = None
    token_logprobs: Sequence[Tensor] | None = None


RankingLoss = Callable[[RecordTensors, "LossSettings"], Tensor]
OPTIONAL = ("reference_sums", "token_logprobs")


def needs(*fields: str) -> Callable[[RankingLoss], RankingLoss]:
    """Declare that a ranking loss reads these fields of ``RecordTensors``, which are None unless a loss needs them.

    Raises:
        ValueError: a field is none of ``OPTIONAL``.
    """
    if unknown := set(fields) - set(OPTIONAL):
        raise ValueError(f"needs({', '.join(sorted(unknown))}): {nearest(min(unknown), OPTIONAL)}")

    def declare(loss: RankingLoss) -> RankingLoss:
        loss.needs = frozenset(fields)  # type: ignore[attr-defined]
        return loss

    return declare


def needed_by(loss: RankingLoss) -> frozenset[str]:
    """The optional fields of ``RecordTensors`` that ``loss`` declares with ``@needs``."""
    return getattr(loss, "needs", frozenset())


def normalised_logprobs(logprob_sums: Tensor, lengths: Tensor, length_exponent: float = 1.0) -> Tensor:
    """Eq. 1: p_i = Σ_t log P_π(y_i,t | x, y_i,<t) / ‖y_i‖^e, with e = 1 in the paper.

    Args:
        logprob_sums: Tensor of shape (k,).
        lengths: Tensor of shape (k,), tokens; an empty response counts as one.
        length_exponent: e; 0 leaves the sums as they are.

    Returns:
        Tensor of shape (k,).
    """
    return logprob_sums / lengths.clamp(min=1).to(logprob_sums.dtype) ** length_exponent


def scored(scores: Tensor) -> Tensor:
    """Which responses carry a score. NaN stands for ``null``. Tensor of shape (k,), bool."""
    return ~torch.isnan(scores)


def score_levels(scores: Tensor) -> Tensor:
    """Which scores are higher than which: 0 for the lowest, one more for each that is higher; −1 where unscored.

    Scores within a relative ``SCORE_TOLERANCE`` (1e-9) of each other share a level (see ``rrhf.common.scores``).

    Args:
        scores: Tensor of shape (k,), NaN where unscored.

    Returns:
        Tensor of shape (k,), int64.
    """
    values, order = torch.sort(scores)  # NaN comes last
    low, high = values[:-1], values[1:]
    same = torch.isclose(low, high, SCORE_TOLERANCE, 0) | torch.isclose(high, low, SCORE_TOLERANCE, 0)
    levels = torch.nn.functional.pad((~same).long().cumsum(0), (min(len(scores), 1), 0))
    return torch.empty_like(order).scatter_(0, order, levels).masked_fill(~scored(scores), -1)


def _below(scores: Tensor) -> Tensor:
    """[i, j]: whether r_i < r_j, both scored. Tensor of shape (k, k), bool."""
    levels = score_levels(scores)
    return (levels[:, None] < levels[None, :]) & scored(scores)[:, None]


def leave_ties(scores: Tensor, least: float) -> Tensor:
    """equal scores are no pair (Eq. 2)."""
    return _below(scores).double()


def halve_ties(scores: Tensor, least: float) -> Tensor:
    """a pair of equal scores counts half in each direction, which pulls its p together (arXiv 1706.03741)."""
    tied = scored(scores)[:, None] & scored(scores)[None, :] & ~_below(scores) & ~_below(scores).t()
    return _below(scores).double() + 0.5 * tied.fill_diagonal_(False)


def widen_ties(scores: Tensor, least: float) -> Tensor:
    """scores nearer than E are equal and no pair: r_j counts above r_i from r_i + E on, each pair by itself."""
    low, high = scores[:, None], scores[None, :]
    rounding = SCORE_TOLERANCE * torch.maximum(low.abs(), high.abs()).clamp(min=least)
    return (_below(scores) & (high - low >= least - rounding)).double()


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


def weighted_pairs(record: RecordTensors, settings: LossSettings) -> Pairs:
    """The pairs of a pairwise loss L = Σ w_ij ℓ(p_i, p_j), where ℓ is the loss of "y_i is worse than y_j".

    w is ``pair_weights`` under ``settings.ties``. A tie under "half" stands here twice, as (i, j) and as (j, i) with
    weight ½ each: (ℓ(p_i, p_j) + ℓ(p_j, p_i)) / 2 is least where p_i = p_j, for every convex ℓ of the difference. For
    the hinge it is |p_i − p_j| / 2, for the logistic loss the cross-entropy against the even odds ½, as Christiano et
    al. (arXiv 1706.03741) and RankNet (Burges et al. 2005) take equal preferences.
    """
    weights = pair_weights(record.scores, settings.ties)
    worse, better = torch.nonzero(weights, as_tuple=True)
    return Pairs(worse, better, weights[worse, better].to(record.logprobs))


def best_response(scores: Tensor) -> int | None:
    """Eq. 3: i' = argmax_i r_i, the first of equals; ``None`` where nothing is scored."""
    if not bool(scored(scores).any()):
        return None
    levels = score_levels(scores)
    return int(torch.nonzero(levels == levels.max())[0])


def hinge(record: RecordTensors, settings: LossSettings) -> Tensor:
    """Eq. 2: L_rank = Σ_{r_i < r_j} max(0, p_i − p_j), without a margin.

    Returns:
        Scalar; 0 (with a graph) where no pair is ordered. So do all ranking losses.
    """
    worse, better, weights = weighted_pairs(record, settings)
    return (weights * (record.logprobs[worse] - record.logprobs[better]).clamp(min=0)).sum()


def ranks(scores: Tensor) -> Tensor:
    """Rank 1 is the best; equal scores share a rank: 1 + how many distinct scores are higher. Shape (k,).

    Unscored responses have rank 1, and take part in nothing.
    """
    levels = score_levels(scores)
    return torch.where(scored(scores), 1 + levels.max() - levels, 1) if len(levels) else levels


def rank_margin(record: RecordTensors, settings: LossSettings) -> Tensor:
    """BRIO (arXiv 2203.16804): Σ_{r_i < r_j} max(0, p_i − p_j + λ_ij), λ_ij = (rank_i − rank_j)·margin."""
    p = record.logprobs
    worse, better, weights = weighted_pairs(record, settings)
    rank = ranks(record.scores).to(p.dtype)
    return (weights * (p[worse] - p[better] + settings.margin * (rank[worse] - rank[better])).clamp(min=0)).sum()


def constant_margin(record: RecordTensors, settings: LossSettings) -> Tensor:
    """SLiC (arXiv 2305.10425): Σ_{r_i < r_j} max(0, p_i − p_j + margin)."""
    worse, better, weights = weighted_pairs(record, settings)
    return (weights * (record.logprobs[worse] - record.logprobs[better] + settings.margin).clamp(min=0)).sum()


def logistic(record: RecordTensors, settings: LossSettings) -> Tensor:
    """Bradley-Terry on p: Σ_{r_i < r_j} − log σ(scale·(p_j − p_i) − margin); SimPO (arXiv 2405.14734) for lists."""
    worse, better, weights = weighted_pairs(record, settings)
    difference = settings.logprob_scale * (record.logprobs[better] - record.logprobs[worse])
    return -(weights * torch.nn.functional.logsigmoid(difference - settings.margin)).sum()


def listmle(record: RecordTensors, settings: LossSettings) -> Tensor:
    """Plackett-Luce, as in PRO (arXiv 2306.17492): Σ_i − log( e^{s p_i} / (e^{s p_i} + Σ_{r_j < r_i} e^{s p_j}) ).

    Equal scores do not compete with each other; without ties this is ListMLE. s is ``logprob_scale``. Under
    ``ties`` "half" an equal y_j is half a rival: ½ e^{s p_j} in the sum.
    """
    scores, logits = record.scores, settings.logprob_scale * record.logprobs
    counts = pair_weights(scores, settings.ties).t().to(logits) + torch.diag(scored(scores)).to(logits)
    rivals = (logits[None, :] + counts.log()).masked_fill(counts == 0, -torch.inf)
    return (rivals[scored(scores)].logsumexp(dim=1) - logits[scored(scores)]).sum()


def no_ranking(record: RecordTensors, settings: LossSettings) -> Tensor:
    """No ranking term: RRHF is then supervised fine-tuning on the best response."""
    return record.logprobs.sum() * 0


def sft(logprob_sums: Tensor, lengths: Tensor, scores: Tensor, reduction: str = "sum") -> Tensor:
    """Eq. 4: L_ft = − Σ_t log P_π(y_i',t | x, y_i',<t) on the best response i' of Eq. 3; a sum over tokens.

    Args:
        logprob_sums: Tensor of shape (k,).
        lengths: Tensor of shape (k,), tokens.
        scores: Tensor of shape (k,), NaN where unscored.
        reduction: "sum" (Eq. 4) or "mean" over the response's tokens.

    Returns:
        Scalar; 0 where nothing is scored.
    """
    best = best_response(scores)
    if best is None:
        return logprob_sums.sum() * 0
    return -SFT_REDUCTIONS[reduction](logprob_sums[best], lengths[best])


SFT_REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda total, length: total,
    "mean": lambda total, length: total / length.clamp(min=1),
}

RANKING_LOSSES: dict[str, RankingLoss] = {
    "hinge": hinge,
    "margin": rank_margin,
    "constant-margin": constant_margin,
    "logistic": logistic,
    "listmle": listmle,
    "none": no_ranking,
}


def describe(function: Callable[..., Tensor]) -> str:
    """The first line of a function's docstring, without its full stop; empty where it has none."""
    return (function.__doc__ or "").strip().partition("\n")[0].removesuffix(".")


@cache
def ranking_loss(name: str) -> RankingLoss:
    """The loss of that name in ``RANKING_LOSSES``, or the function that ``pkg.module:function`` names.

    Raises:
        UserError: there is none.
    """
    if ":" in name:
        return load_function(name, "ranking loss", "f(record, settings) -> Tensor")
    if name not in RANKING_LOSSES:
        raise UserError(f"{nearest(name, RANKING_LOSSES)}; or give pkg.module:function")
    return RANKING_LOSSES[name]


@dataclass  # not frozen: RRHFConfig inherits it beside transformers' arguments, which are not
class LossSettings:
    """Eq. 5 and its variants: which ranking loss, and how the two terms are weighted."""

    ranking_loss: str = field(
        default="hinge",
        metadata={
            "help": ". ".join(f"{name}: {describe(loss)}" for name, loss in RANKING_LOSSES.items())
            + ". Or pkg.module:function, called with rrhf.losses.RecordTensors and these settings"
        },
    )
    rank_weight: float = field(default=1.0, metadata={"help": "weight of the ranking loss (Eq. 5: 1)"})
    sft_weight: float = field(
        default=1.0, metadata={"help": "weight of the cross-entropy on the best response (Eq. 5: 1)"}
    )
    sft_reduction: str = field(default="sum", metadata={"help": "sum over tokens (Eq. 4), or mean"})
    length_exponent: float = field(default=1.0, metadata={"help": "p = log-probability / length ** this (Eq. 1: 1)"})
    margin: float = field(
        default=0.0, metadata={"help": "of margin (times the difference of ranks), constant-margin and logistic"}
    )
    logprob_scale: float = field(default=1.0, metadata={"help": "multiplies p in logistic and listmle"})
    ties: str = field(
        default="none",
        metadata={"help": "what equal scores do. " + ". ".join(f"{name}: {describe(f)}" for name, f in TIES.items())},
    )
    released_compat: bool = field(
        default=False, metadata={"help": "divide as the released code does: by the padded length (docs/paper.md)"}
    )

    def __post_init__(self) -> None:
        faults = self.faults()
        if faults:
            raise UserError("\n".join(faults))

    def faults(self) -> list[str]:
        """What is wrong with the settings, one sentence a fault."""
        faults = []
        try:
            ranking_loss(self.ranking_loss)
        except UserError as error:
            faults.append(f"--ranking_loss {self.ranking_loss}: {error}")
        if self.sft_reduction not in SFT_REDUCTIONS:
            faults.append(f"--sft_reduction {self.sft_reduction}: {nearest(self.sft_reduction, SFT_REDUCTIONS)}")
        try:
            tie_rule(self.ties)
        except UserError as error:
            faults.append(f"--ties {self.ties}: {error}")
        for name in ("rank_weight", "sft_weight", "margin", "logprob_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                faults.append(f"--{name} {value}: must be a number that is not negative")
        if not math.isfinite(self.length_exponent):
            faults.append(f"--length_exponent {self.length_exponent}: must be a finite number")
        return faults


class Loss(NamedTuple):
    """The loss of one record, Eq. 5, and what it is made of. ``logprobs`` is p, Tensor of shape (k,)."""

    total: Tensor
    rank: Tensor
    sft: Tensor
    logprobs: Tensor


def rrhf_loss(
    logprob_sums: Tensor,
    lengths: Tensor,
    scores: Tensor,
    settings: LossSettings,
    padded_length: int | None = None,
    *,
    reference_sums: Tensor | None = None,
    token_logprobs: Sequence[Tensor] | None = None,
) -> Loss:
    """Eq. 5: L = L_rank + L_ft, with the weights and variants of ``settings``.

    Args:
        logprob_sums: Tensor of shape (k,), with the graph.
        lengths: Tensor of shape (k,), tokens.
        scores: Tensor of shape (k,), NaN where unscored.
        settings: which losses and weights.
        padded_length: the longest row of the record, query and response, in tokens. The released code overwrites the
            labels before it counts them, so it divides every sum by this; used with ``settings.released_compat`` only.
        reference_sums, token_logprobs: see ``RecordTensors``; only for ranking losses that need them.

    Raises:
        ValueError: something that the settings or the loss need is not given.
        UserError: a ranking loss from outside gave something else than a scalar tensor.
    """
    divisors, reduction = lengths, settings.sft_reduction
    if settings.released_compat:
        if padded_length is None:
            raise ValueError("released_compat needs padded_length")
        divisors, reduction = torch.full_like(lengths, padded_length), "mean"
    logprobs = normalised_logprobs(logprob_sums, divisors, settings.length_exponent)
    record = RecordTensors(logprob_sums, lengths, scores, logprobs, reference_sums, token_logprobs)
    loss = ranking_loss(settings.ranking_loss)
    if missing := [name for name in sorted(needed_by(loss)) if getattr(record, name) is None]:
        raise ValueError(f"the ranking loss {settings.ranking_loss} needs {' and '.join(missing)}")
    rank = loss(record, settings)
    if not isinstance(rank, Tensor) or rank.shape != ():
        given = f"shape {tuple(rank.shape)}" if isinstance(rank, Tensor) else type(rank).__name__
        raise UserError(f"--ranking_loss {settings.ranking_loss}: it must return a scalar tensor, not {given}")
    fit = sft(logprob_sums, divisors, scores, reduction)
    return Loss(settings.rank_weight * rank + settings.sft_weight * fit, rank, fit, logprobs)
