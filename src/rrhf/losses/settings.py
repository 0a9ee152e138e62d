"""Eq. 4 and 5, the ranking losses by name, and the settings of a loss."""

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
from rrhf.losses.lists import listmle
from rrhf.losses.pairs import TIES, constant_margin, hinge, logistic, rank_margin, tie_rule
from rrhf.losses.record import (
    RankingLoss,
    RankingSettings,
    RecordTensors,
    best_response,
    needed_by,
    normalised_logprobs,
)


def no_ranking(record: RecordTensors, settings: RankingSettings) -> Tensor:
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
