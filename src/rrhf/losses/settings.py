"""Eq. 4 and 5, the ranking losses by name, and the settings of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from rrhf.common.errors import UserError, nearest
from rrhf.common.imports import call_own, load_function
from rrhf.losses.lists import lire, listmle, ndcg
from rrhf.losses.pairs import TIES, constant_margin, cpo, hinge, logistic, orpo, rank_margin, simpo, tie_rule
from rrhf.losses.record import (
    OPTIONAL,
    RankingLoss,
    RankingSettings,
    RecordTensors,
    best_response,
    needed_by,
    normalised_logprobs,
)
from rrhf.losses.reference import DPO_PAIRS, dpo, dpo_listmle, ipo, kto, lambda_loss, swepo
from rrhf.losses.tokens import grpo, rloo


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
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "listmle": listmle,
    "ndcg": ndcg,
    "lire": lire,
    "dpo": dpo,
    "ipo": ipo,
    "kto": kto,
    "dpo-listmle": dpo_listmle,
    "lambda": lambda_loss,
    "swepo": swepo,
    "grpo": grpo,
    "rloo": rloo,
    "none": no_ranking,
}

# What a flag that is left out stands for: Eq. 5's, or what the loss's own paper has.
DEFAULTS: dict[str, float | str] = {
    "rank_weight": 1.0,
    "sft_weight": 1.0,
    "sft_reduction": "sum",
    "margin": 0.0,
    "logprob_scale": 1.0,
}
ALONE = ("ndcg", "lire", "dpo", "ipo", "kto", "dpo-listmle", "lambda", "swepo", "grpo", "rloo")
PRESETS: dict[str, dict[str, float | str]] = {
    **{name: {"sft_weight": 0.0} for name in ALONE},
    "simpo": {"sft_weight": 0.0, "logprob_scale": 2.0, "margin": 1.0},
    "cpo": {"sft_reduction": "mean"},
    "orpo": {"sft_reduction": "mean", "rank_weight": 0.1},
}

# Which of our losses read a setting that not all of them do.
READERS: dict[str, tuple[str, ...]] = {
    "margin": ("margin", "constant-margin", "logistic", "simpo"),
    "logprob_scale": ("logistic", "simpo", "listmle", "ndcg", "lire"),
    "score_scale": ("ndcg", "lire", "lambda", "swepo"),
    "dpo_beta": ("cpo", "dpo", "ipo", "kto", "dpo-listmle", "lambda", "swepo"),
    "dpo_pairs": ("dpo", "ipo"),
    "clip_range": ("grpo", "rloo"),
    "token_kl": ("grpo", "rloo"),
}


def default_words(name: str) -> str:
    """What is taken where this flag is left out, in words."""
    others: dict[float | str, list[str]] = {}
    for loss, preset in PRESETS.items():
        if name in preset:
            others.setdefault(preset[name], []).append(loss)
    words = [f"{value:g} for {', '.join(names)}" if name != "sft_reduction" else f"{value} for {', '.join(names)}"
             for value, names in others.items()]  # fmt: skip
    usual = DEFAULTS[name]
    return "; ".join([f"default: {usual if isinstance(usual, str) else format(usual, 'g')}", *words])


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
    rank_weight: float = field(
        default=None,  # type: ignore[assignment]  # settled by the loss: ``DEFAULTS`` and ``PRESETS``
        metadata={"help": f"weight of the ranking loss (Eq. 5: 1); {default_words('rank_weight')}"},
    )
    sft_weight: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": f"weight of the cross-entropy on the best response (Eq. 5: 1); {default_words('sft_weight')}"
        },
    )
    sft_reduction: str = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": f"sum over tokens (Eq. 4), or mean; {default_words('sft_reduction')}"},
    )
    length_exponent: float = field(default=1.0, metadata={"help": "p = log-probability / length ** this (Eq. 1: 1)"})
    margin: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "of margin (times the difference of ranks), constant-margin, logistic and simpo (γ); "
            + default_words("margin")
        },
    )
    logprob_scale: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "multiplies p in logistic, simpo (β), listmle, ndcg and lire (1/T); "
            + default_words("logprob_scale")
        },
    )
    score_scale: float = field(
        default=1.0, metadata={"help": "multiplies scores where their sizes count: lambda, ndcg, lire, and swepo (α)"}
    )
    dpo_beta: float = field(
        default=0.1, metadata={"help": "β of dpo, dpo-listmle, ipo (its τ), kto, lambda, swepo and cpo"}
    )
    dpo_pairs: str = field(
        default="all", metadata={"help": "pairs of dpo and ipo: all, or best: the best response with each other one"}
    )
    clip_range: float = field(default=0.2, metadata={"help": "ratios of grpo and rloo are clipped to 1 ± this"})
    token_kl: float = field(
        default=0.0, metadata={"help": "weight of a token's KL to the reference (k3) in grpo and rloo"}
    )
    ties: str = field(
        default="none",
        metadata={"help": "what equal scores do. " + ". ".join(f"{name}: {describe(f)}" for name, f in TIES.items())},
    )
    released_compat: bool = field(
        default=False, metadata={"help": "divide as the released code does: by the padded length (docs/paper.md)"}
    )

    def __post_init__(self) -> None:
        self.settle()
        faults = self.faults()
        if faults:
            raise UserError("\n".join(faults))

    def settle(self) -> None:
        """Give what was left out the value that the loss's paper has."""
        for name, value in {**DEFAULTS, **PRESETS.get(self.ranking_loss, {})}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def unread(self) -> list[str]:
        """Which settings have another value than by default and are not read by the loss, one sentence each."""
        if ":" in self.ranking_loss:  # somebody's own may read any
            return []
        usual = {**{f.name: f.default for f in fields(LossSettings)}, **DEFAULTS, **PRESETS.get(self.ranking_loss, {})}
        return [
            f"--{name} {getattr(self, name)}: the ranking loss {self.ranking_loss} does not read it, but "
            f"{', '.join(readers)} do"
            for name, readers in READERS.items()
            if self.ranking_loss not in readers and getattr(self, name) != usual[name]
        ]

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
        if self.dpo_pairs not in DPO_PAIRS:
            faults.append(f"--dpo_pairs {self.dpo_pairs}: {nearest(self.dpo_pairs, DPO_PAIRS)}")
        if not (math.isfinite(self.dpo_beta) and self.dpo_beta > 0):
            faults.append(f"--dpo_beta {self.dpo_beta}: must be a number above 0")
        for name in ("rank_weight", "sft_weight", "margin", "logprob_scale", "score_scale", "clip_range", "token_kl"):
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
    batch_kl: Tensor | None = None,
    old_token_logprobs: Sequence[Tensor] | None = None,
    reference_token_logprobs: Sequence[Tensor] | None = None,
) -> Loss:
    """Eq. 5: L = L_rank + L_ft, with the weights and variants of ``settings``.

    Args:
        logprob_sums: Tensor of shape (k,), with the graph.
        lengths: Tensor of shape (k,), tokens.
        scores: Tensor of shape (k,), NaN where unscored.
        settings: which losses and weights.
        padded_length: the longest row of the record, query and response, in tokens. The released code overwrites the
            labels before it counts them, so it divides every sum by this; used with ``settings.released_compat`` only.
        reference_sums, token_logprobs, batch_kl, old_token_logprobs, reference_token_logprobs: see ``RecordTensors``;
            only for ranking losses that need them.

    Raises:
        ValueError: something that the settings or the loss need is not given.
        UserError: a ranking loss from outside failed, or gave something else than a scalar tensor.
    """
    divisors, reduction = lengths, settings.sft_reduction
    if settings.released_compat:
        if padded_length is None:
            raise ValueError("released_compat needs padded_length")
        divisors, reduction = torch.full_like(lengths, padded_length), "mean"
    logprobs = normalised_logprobs(logprob_sums, divisors, settings.length_exponent)
    optional = (reference_sums, token_logprobs, batch_kl, old_token_logprobs, reference_token_logprobs)
    record = RecordTensors(logprob_sums, lengths, scores, logprobs, *optional)
    loss = ranking_loss(settings.ranking_loss)
    if missing := [name for name in OPTIONAL if name in needed_by(loss, settings) and getattr(record, name) is None]:
        raise ValueError(f"the ranking loss {settings.ranking_loss} needs {' and '.join(missing)}")
    outside = ":" in settings.ranking_loss
    what = f"--ranking_loss {settings.ranking_loss}"
    rank = call_own(loss, what, record, settings) if outside else loss(record, settings)
    if not isinstance(rank, Tensor) or rank.shape != ():
        given = f"shape {tuple(rank.shape)}" if isinstance(rank, Tensor) else type(rank).__name__
        raise UserError(f"{what}: it must return a scalar tensor, not {given}")
    fit = sft(logprob_sums, divisors, scores, reduction)
    return Loss(settings.rank_weight * rank + settings.sft_weight * fit, rank, fit, logprobs)
