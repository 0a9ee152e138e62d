"""OP-k: the policy samples the responses that it is trained on, every k optimiser steps (Table 1).

data → train, which samples and scores, → evaluate → report. Responses that the data provides are scored before.
"""

from __future__ import annotations

from typing import Any

from rrhf.common.errors import UserError
from rrhf.models.cache import PolicyCache
from rrhf.recipes.config import RunConfig
from rrhf.recipes.offline import (
    Pass,
    carry_out,
    check_evaluation,
    data_stage,
    evaluate_stage,
    finish,
    score_stage,
    train_stage,
)
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.files import read_records
from rrhf.sampling.settings import SamplingSettings


def run_online(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Bring a run to its end whose training samples every ``config.train.resample_steps`` steps.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        UserError: responses would not come from the policy that is trained, or as ``run_offline``.
    """
    from rrhf.training.online import Online
    from rrhf.training.windows import FOLDER, window_seconds

    context = config.scoring.context(config.text, config.score_remote, journals=run.model / FOLDER)
    online = Online(_sampling(config), config.score.reward, config.score.reward_weights or None, context)
    whole = Pass(run, config, config.model, PolicyCache())
    check_evaluation(whole)
    carry_out([data_stage(whole)], run)
    data, stages = run.queries, []
    if next(read_records(run.queries)).responses:
        data, stages = run.scored, [score_stage(whole, run.queries)]
    carry_out(stages, run)
    training = train_stage(whole, data, online)
    trained = training.is_complete()
    carry_out([training], run)
    if not trained:
        run.split_time("train", window_seconds(run.model))
    carry_out([evaluate_stage(whole)], run)
    return finish(run, [run])


def _sampling(config: RunConfig) -> SamplingSettings:
    """How responses are sampled. Refuses, before any work, what would not be the policy's own."""
    if config.sample is None:
        raise UserError("train.resample_steps with sample: null: nothing is sampled: give the section sample")
    if config.sources.source:
        raise UserError(
            f"train.resample_steps with sample.source {' '.join(config.sources.source)}: responses would come from "
            "weights that stay as they are: a server, vLLM, OpenVINO and a file cannot be given those of the policy in "
            "training. Leave sample.source out: the policy itself samples"
        )
    return config.sample
