"""OP-k: the policy samples the responses that it is trained on, every k optimiser steps (Table 1).

data → train, which samples and scores, → evaluate → report. Responses that the data provides are scored before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError
from rrhf.common.files import read_object
from rrhf.models.cache import PolicyCache
from rrhf.recipes.config import RunConfig
from rrhf.recipes.offline import (
    Pass,
    carry_out,
    check_evaluation,
    data_stage,
    evaluate_stage,
    finish,
    loss_needs,
    score_stage,
    train_stage,
)
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.files import read_records

if TYPE_CHECKING:
    from rrhf.training.online import Online


def run_online(run: RunFolder, config: RunConfig, policies: PolicyCache) -> dict[str, Any]:
    """Bring a run to its end whose training samples every ``config.train.resample_steps`` steps.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        UserError: responses would not come from the policy that is trained, or as ``run_offline``.
    """
    from rrhf.training.windows import window_seconds

    cut = _as_trained(config)
    online = _online(run, cut)
    whole = Pass(run, config, config.model, policies)
    check_evaluation(whole)
    carry_out([data_stage(whole)], run)
    data, stages = run.queries, []
    if any(record.responses for record in read_records(run.queries)):
        unshaped = replace(cut, scoring=replace(cut.scoring, kl_beta=0.0))  # the KL term is that of each window
        data, stages = run.scored, [score_stage(replace(whole, config=unshaped), run.queries)]
    carry_out(stages, run)
    carry_out([train_stage(whole, data, online)], run)
    if "sample" not in read_object(run.timings):  # a process may have been stopped between the two
        run.split_time("train", window_seconds(run.model))
    carry_out([evaluate_stage(whole)], run)
    return finish(run, [run])


def _as_trained(config: RunConfig) -> RunConfig:
    """Log-probabilities are of the tokens that training sees: texts are cut as it cuts them."""
    length = config.scoring.max_length or config.train.max_length
    return replace(config, text=config.train.text, scoring=replace(config.scoring, max_length=length))


def _online(run: RunFolder, config: RunConfig) -> Online:
    """How responses are sampled and scored. Refuses, before any work, samples that would not be the policy's own."""
    from rrhf.training.online import Online
    from rrhf.training.windows import FOLDER

    if config.sample is None:
        raise UserError("train.resample_steps with sample: null: nothing is sampled: give the section sample")
    if config.sources.source:
        raise UserError(
            f"train.resample_steps with sample.source {' '.join(config.sources.source)}: responses would come from "
            "weights that stay as they are: a server, vLLM, OpenVINO and a file cannot be given those of the policy in "
            "training. Leave sample.source out: the policy itself samples"
        )
    score, scoring = config.score, config.scoring
    context = scoring.context(config.text, config.score_remote, journals=run.model / FOLDER)
    if any("reference" in name for name in loss_needs(config)):
        of_loss, of_kl = config.train.reference_model, scoring.reference_model
        if of_loss and of_kl and of_loss != of_kl:
            raise UserError(
                f"train.reference_model {of_loss} and score.reference_model {of_kl} (where score.kl_beta is given, by "
                "default the run's model): one ρ is in memory while the policy samples, for both: name the same"
            )
        context = replace(context, reference_model=of_kl or of_loss or config.model.model)
    weights = score.reward_weights or None
    return Online(config.sample, score.reward, weights, scoring.reward_normalisation, context, scoring.kl_beta)
