"""The Bradley–Terry loss of a reward model over all ordered pairs of one query's responses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rrhf.losses import pair_weights


def bradley_terry(rewards: Tensor, scores: Tensor, ties: str = "none", center: float = 0.0) -> Tensor | None:
    """L = Σ_ij w_ij · (−log σ(R_j − R_i) + c · (R_i + R_j)²) / Σ_ij w_ij, w = ``rrhf.losses.pair_weights``.

    w_ij is 1 for every pair with r_i < r_j; what equal scores do is ``ties``, as in every ranking loss. The mean over a
    query's pairs lets every query count the same, whatever its number of responses (Ouyang et al., arXiv 2203.02155,
    Eq. 1).

    Args:
        rewards: R, what the model says, Tensor of shape (k,), with the graph.
        scores: r, what is to be learnt, Tensor of shape (k,), NaN where unscored.
        ties: a rule of ``rrhf.losses.TIES``.
        center: c of TRL's centring term (arXiv 2312.09244).

    Returns:
        A scalar; None where there is no pair.
    """
    every = pair_weights(scores, ties)
    worse, better = torch.nonzero(every, as_tuple=True)
    if not len(worse):
        return None
    weights = every[worse, better].to(rewards)
    losses = -logsigmoid(rewards[better] - rewards[worse])
    if center:
        losses = losses + center * (rewards[better] + rewards[worse]).square()
    return (weights * losses).sum() / weights.sum()
