"""The losses of RRHF (arXiv 2304.05302, Eq. 1-5) and other ranking losses: pure functions of one record's tensors.

Symbols: k responses y_i of one query x, with scores r_i (what the reward says) and log-probabilities
p_i (what the model says). ``logprob_sums`` is Σ_t log P_π(y_i,t | x, y_i,<t), ``lengths`` is ‖y_i‖ in tokens.

A ranking loss is a function ``f(record: RecordTensors, settings: LossSettings) -> Tensor`` (a scalar) and a line in
``RANKING_LOSSES``; the first line of its docstring describes it in ``--help`` and on model cards. One that reads a
field of ``RecordTensors`` that may be None says so with ``@needs``. Functions elsewhere are named as
``pkg.module:function``.

    record.py      what a loss is given of one record; Eq. 1 and 3
    pairs.py       Eq. 2 and other losses of pairs; what equal scores do
    lists.py       losses of whole lists
    reference.py   losses against a reference model
    tokens.py      policy gradients over per-token log-probabilities
    settings.py    Eq. 4 and 5; every loss by name; LossSettings
"""

from rrhf.losses.lists import lire, listmle, ndcg, soft_sort
from rrhf.losses.pairs import (
    TIES,
    Pairs,
    constant_margin,
    cpo,
    halve_ties,
    hinge,
    leave_ties,
    log_odds,
    logistic,
    ordered_pairs,
    orpo,
    pair_weights,
    rank_margin,
    simpo,
    tie_rule,
    weighted_pairs,
    widen_ties,
)
from rrhf.losses.record import (
    OPTIONAL,
    RankingLoss,
    RankingSettings,
    RecordTensors,
    beside_the_mean,
    best_response,
    needed_by,
    needs,
    normalised_logprobs,
    ranks,
    relevance,
    score_levels,
    scored,
)
from rrhf.losses.reference import dpo, dpo_listmle, ipo, kto, lambda_loss, log_ratios, swepo
from rrhf.losses.settings import (
    PRESETS,
    RANKING_LOSSES,
    SFT_REDUCTIONS,
    Loss,
    LossSettings,
    describe,
    no_ranking,
    ranking_loss,
    rrhf_loss,
    sft,
)
from rrhf.losses.tokens import grpo, grpo_advantages, k3, rloo, rloo_advantages

__all__ = [
    "OPTIONAL", "PRESETS", "RANKING_LOSSES", "SFT_REDUCTIONS", "TIES", "Loss", "LossSettings", "Pairs",
    "RankingLoss", "RankingSettings", "RecordTensors", "beside_the_mean", "best_response", "constant_margin",
    "cpo", "describe", "dpo", "dpo_listmle", "grpo", "grpo_advantages", "halve_ties", "hinge", "ipo", "k3", "kto",
    "lambda_loss", "leave_ties", "lire", "listmle", "log_odds", "log_ratios", "logistic", "ndcg", "needed_by",
    "needs", "no_ranking", "normalised_logprobs", "ordered_pairs", "orpo", "pair_weights", "rank_margin",
    "ranking_loss", "ranks", "relevance", "rloo", "rloo_advantages", "rrhf_loss", "score_levels", "scored", "sft",
    "simpo", "soft_sort", "swepo", "tie_rule", "weighted_pairs", "widen_ties",
]  # fmt: skip
