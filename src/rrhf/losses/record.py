"""What a ranking loss is given: the tensors of one record, and Eq. 1 and 3 of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rrhf.common.errors import nearest
from rrhf.common.scores import SCORE_TOLERANCE


class RankingSettings(Protocol):
    """What ranking losses read of ``LossSettings``, which knows all of them and so cannot be imported here."""

    margin: float
    logprob_scale: float
    length_exponent: float
    ties: str
    dpo_beta: float
    dpo_pairs: str
    score_scale: float
    clip_range: float
    token_kl: float


@dataclass(frozen=True)
class RecordTensors:
    """What a ranking loss sees of one record: k responses of one query.

    Attributes:
        sums: Σ_t log P_π(y_i,t | x, y_i,<t), Tensor of shape (k,), with the graph.
        lengths: ‖y_i‖ in tokens, Tensor of shape (k,).
        scores: r, Tensor of shape (k,), NaN where unscored.
        logprobs: p of Eq. 1, Tensor of shape (k,), with the graph.
        reference_sums: ``sums`` under the reference model ρ, Tensor of shape (k,).
        batch_kl: max(0, mean of log π(y|x) − log ρ(y|x) over all scored responses of the optimiser step), a scalar
            without a graph.
        token_logprobs: log P_π(y_i,t | x, y_i,<t), k tensors of shape (‖y_i‖,), with the graph.
        old_token_logprobs: the same under the policy that drew the responses, when it drew them; without a graph.
        reference_token_logprobs: the same under ρ; without a graph.

    The last five are None unless the loss needs them (``needs``).
    """

    sums: Tensor
    lengths: Tensor
    scores: Tensor
    logprobs: Tensor
    reference_sums: Tensor | None = None
    token_logprobs: Sequence[Tensor] | None = None
    batch_kl: Tensor | None = None
    old_token_logprobs: Sequence[Tensor] | None = None
    reference_token_logprobs: Sequence[Tensor] | None = None


RankingLoss = Callable[[RecordTensors, RankingSettings], Tensor]
OPTIONAL = ("reference_sums", "token_logprobs", "batch_kl", "old_token_logprobs", "reference_token_logprobs")


def needs(*fields: str, **where: str) -> Callable[[RankingLoss], RankingLoss]:
    """Declare that a ranking loss reads these fields of ``RecordTensors``, which are None unless a loss needs them.

    ``setting="field"``: it reads this field only where that setting is not 0.

    Raises:
        ValueError: a field is none of ``OPTIONAL``.
    """
    if unknown := {*fields, *where.values()} - set(OPTIONAL):
        raise ValueError(f"needs({', '.join(sorted(unknown))}): {nearest(min(unknown), OPTIONAL)}")

    def declare(loss: RankingLoss) -> RankingLoss:
        loss.needs = frozenset(fields)  # type: ignore[attr-defined]
        loss.needs_where = where  # type: ignore[attr-defined]
        return loss

    return declare


def needed_by(loss: RankingLoss, settings: RankingSettings) -> frozenset[str]:
    """The optional fields of ``RecordTensors`` that ``loss`` declares with ``@needs``, under these settings."""
    always: frozenset[str] = getattr(loss, "needs", frozenset())
    where: dict[str, str] = getattr(loss, "needs_where", {})
    return always | {name for setting, name in where.items() if getattr(settings, setting)}


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


def below(scores: Tensor) -> Tensor:
    """[i, j]: whether r_i < r_j, both scored. Tensor of shape (k, k), bool."""
    levels = score_levels(scores)
    return (levels[:, None] < levels[None, :]) & scored(scores)[:, None]


def ranks(scores: Tensor) -> Tensor:
    """Rank 1 is the best; equal scores share a rank: 1 + how many distinct scores are higher. Shape (k,).

    Unscored responses have rank 1, and take part in nothing.
    """
    levels = score_levels(scores)
    return torch.where(scored(scores), 1 + levels.max() - levels, 1) if len(levels) else levels


def best_response(scores: Tensor) -> int | None:
    """Eq. 3: i' = argmax_i r_i, the first of equals; ``None`` where nothing is scored."""
    if not bool(scored(scores).any()):
        return None
    levels = score_levels(scores)
    return int(torch.nonzero(levels == levels.max())[0])


def beside_the_mean(scores: Tensor) -> Tensor:
    """1 for scores above the mean of the record's scores, −1 below, 0 at it and where unscored.

    At the mean is what is nearer to it than ``SCORE_TOLERANCE`` of the largest score: a mean of 0 by cancellation (0.1,
    0.2, −0.3, 0) is off by more than a share of itself.

    Args:
        scores: Tensor of shape (k,), NaN where unscored.

    Returns:
        Tensor of shape (k,), the type of ``scores``.
    """
    known = scored(scores)
    if not known.any():
        return torch.zeros_like(scores)
    mean = scores[known].mean()
    at = (scores - mean).abs() <= SCORE_TOLERANCE * scores[known].abs().max()
    return torch.sign(scores - mean).masked_fill(at | ~known, 0)


def relevance(scores: Tensor, scale: float) -> Tensor:
    """ψ_i = mean over the other scored responses j of σ(scale·(r_i − r_j)): how likely y_i beats another one.

    What learning to rank calls a label. Bradley-Terry on the scores makes one in (0, 1) of scores of any size, and
    equal ones of equal scores.

    Args:
        scores: of scored responses alone, Tensor of shape (n,).
    """
    others = ~torch.eye(len(scores), dtype=torch.bool)
    beats = torch.sigmoid(scale * (scores[:, None] - scores[None, :]))
    return (beats * others).sum(dim=1) / max(len(scores) - 1, 1)
