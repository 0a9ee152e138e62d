"""Losses of whole lists of responses."""

from __future__ import annotations

import torch
from torch import Tensor

from rrhf.losses.pairs import pair_weights
from rrhf.losses.record import RankingSettings, RecordTensors, scored


def listmle(record: RecordTensors, settings: RankingSettings) -> Tensor:
    """Plackett-Luce, as in PRO (arXiv 2306.17492): Σ_i − log( e^{s p_i} / (e^{s p_i} + Σ_{r_j < r_i} e^{s p_j}) ).

    Equal scores do not compete with each other; without ties this is ListMLE. s is ``logprob_scale``. Under
    ``ties`` "half" an equal y_j is half a rival: ½ e^{s p_j} in the sum.
    """
    scores, logits = record.scores, settings.logprob_scale * record.logprobs
    counts = pair_weights(scores, settings.ties).t().to(logits) + torch.diag(scored(scores)).to(logits)
    rivals = (logits[None, :] + counts.log()).masked_fill(counts == 0, -torch.inf)
    return (rivals[scored(scores)].logsumexp(dim=1) - logits[scored(scores)]).sum()
