"""The Bradley–Terry loss of a reward model over all ordered pairs of one query's responses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rrhf.losses import ordered_pairs, score_levels


def tied_pairs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (i, j) with i < j of every pair with equal scores, both scored. Two tensors of shape (pairs,)."""
    levels = score_levels(scores)
    same = (levels[:, None] == levels[None, :]) & (levels[:, None] >= 0)
    first, second = torch.nonzero(same.triu(diagonal=1), as_tuple=True)
    return first, second


def bradley_terry(rewards: Tensor, scores: Tensor, ties: str = "drop", center: float = 0.0) -> Tensor | None:
    """L = mean over pairs of −log σ(R_j − R_i) + c · (R_i + R_j)², for all pairs with r_i < r_j.

    The mean over a query's pairs lets every query count the same, whatever its number of responses (Ouyang et al.,
    arXiv 2203.02155, Eq. 1). Of a tie with ``ties="half"`` the first term is
    ½ · (−log σ(R_j − R_i) − log σ(R_i − R_j)).

    Args:
        rewards: R, what the model says, Tensor of shape (k,), with the graph.
        scores: r, what is to be learnt, Tensor of shape (k,), NaN where unscored.
        ties: ``drop`` (equal scores are no pair) or ``half``.
        center: c of TRL's centring term (arXiv 2312.09244).

    Returns:
        A scalar; None where there is no pair.
    """
    worse, better = ordered_pairs(scores)
    terms = [-logsigmoid(rewards[better] - rewards[worse])]
    sums = [rewards[better] + rewards[worse]]
    if ties == "half":
        first, second = tied_pairs(scores)
        apart = rewards[first] - rewards[second]
        terms.append(-0.5 * (logsigmoid(apart) + logsigmoid(-apart)))
        sums.append(rewards[first] + rewards[second])
    losses = torch.cat(terms)
    if not len(losses):
        return None
    loss = losses.mean()
    return loss + center * torch.cat(sums).square().mean() if center else loss
