"""The paper's workflow in a run folder: sample once, score, train, evaluate, report. Run again, it goes on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.evaluation.stage import evaluate_models, reward_context
from rrhf.models.cache import PolicyCache
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings
from rrhf.recipes.config import RunConfig
from rrhf.recipes.data import data_digests, write_queries
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import read_records, write_records
from rrhf.report.card import write_card
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.stage import rewards_digests, score_file
from rrhf.sampling.sources.parsing import parse_source
from rrhf.training.folder import is_trained, last_checkpoint

log = logging.getLogger("rrhf")


@dataclass(frozen=True)
class Stage:
    """One arrow of the data flow.

    ``inputs``: what the result depends on beside the settings, each with a digest. ``work`` makes the result.
    """

    name: str
    result: Path
    inputs: Callable[[], dict[str, str]]
    work: Callable[[], object]
    beside: Path | None = None  # another file that it makes

    def is_complete(self) -> bool:
        if self.beside is not None and not self.beside.exists():
            return False
        return is_trained(self.result) if self.name == "train" else self.result.exists()

    def is_kept(self) -> bool:
        """Whether something made before is taken up. Parts look after their inputs themselves, checkpoints do not."""
        return self.is_complete() or (self.name == "train" and last_checkpoint(self.result) is not None)


def run_offline(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Bring the run to its end, stage by stage; a stage whose file is complete is not done again.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        UserError: a stage cannot be done, or a result was made of other data or another model than stand there now.
    """
    from rrhf.report import write_report

    if not run.evaluation.exists():
        _check_evaluation(run, config)
    for stage in _stages(run, config, PolicyCache()):
        run.remember_inputs(stage.name, stage.result, stage.inputs(), stage.is_kept())
        if stage.is_complete():
            log.info(f"{stage.name}: {stage.result.name} is complete")
            # A process may have been stopped while it cleared up.
            shutil.rmtree(stage.result.with_name(stage.result.name + ".parts"), ignore_errors=True)
            continue
        log.info(f"{stage.name}: begins")
        with run.timed(stage.name):
            stage.work()
    write_card(run.model, refresh=True)  # now with the evaluation
    with run.timed("report"):
        write_report([run.folder], run.report)
    evaluation: dict[str, Any] = json.loads(run.evaluation.read_text(encoding="utf-8"))
    return evaluation


def _stages(run: RunFolder, config: RunConfig, policies: PolicyCache) -> list[Stage]:
    def files(*paths: Path) -> dict[str, str]:
        return {path.name: checksum_of_file(path) for path in paths}

    def models() -> dict[str, str]:
        return {name: model_digest(name) for name in (config.model.model, config.evaluate.judge(evaluated))}

    evaluated = _evaluated(run, config)
    return [
        Stage(
            "data",
            run.held_out,
            lambda: data_digests(config.data),
            lambda: write_queries(config.data, run.queries, run.held_out),
            beside=run.queries,
        ),
        Stage(
            "sample",
            run.responses,
            lambda: {**files(run.queries), **_sampled(config)},
            lambda: _sample(run, config, policies),
        ),
        Stage(
            "score",
            run.scored,
            lambda: {**files(run.responses), **_scored(run, config)},
            lambda: _score(run, config, policies),
        ),
        Stage(
            "train",
            run.model,
            lambda: {**files(run.scored), config.model.model: model_digest(config.model.model)},
            lambda: _train(run, config, policies),
        ),
        Stage(
            "evaluate",
            run.evaluation,
            lambda: {
                **files(run.held_out),
                **models(),
                run.model.name: model_digest(str(run.model)),
                **rewards_digests(config.evaluate_rewards, _evaluation_context(config)),
            },
            lambda: _evaluate(run, config, policies),
        ),
    ]


def _sampled(config: RunConfig) -> dict[str, str]:
    """The digests of the models and files that responses come from; nobody knows a server's."""
    if config.sample is None:
        return {}
    if not config.sources.source:
        return {config.model.model: model_digest(config.model.model)}
    from rrhf.sampling.sources.build import source_digest

    digests = {}
    for written in config.sources.source:
        with suppress(UserError):  # a file that is no more there: sampling says so, where it is still to be done
            spec = parse_source(written)
            digests[spec.name] = source_digest(spec) or ""
    return digests


def _sample(run: RunFolder, config: RunConfig, policies: PolicyCache) -> None:
    if config.sample is None:
        write_records(run.responses, read_records(run.queries, require="responses"))
        return
    from rrhf.sampling.stage import sample_file

    sample_file(
        run.queries,
        run.responses,
        config.model,
        config.sample,
        config.text,
        sources=config.sources.source,
        remote=config.remote,
        policies=policies,
    )


def _scored(run: RunFolder, config: RunConfig) -> dict[str, str]:
    """The digests of the rewards, and of the models whose log-probabilities shape their scores."""
    context = config.scoring.context(config.text, config.score_remote, records=run.responses)
    columns = {model: name for name, model in config.scoring.sums_columns(context).items()}
    return {**rewards_digests(config.score, context), **columns}


def _score(run: RunFolder, config: RunConfig, policies: PolicyCache) -> None:
    policies.release()  # free the sampling weights
    score_file(run.responses, run.scored, config.score, config.scoring, config.text, config.score_remote)


def _train(run: RunFolder, config: RunConfig, policies: PolicyCache) -> None:
    from rrhf.report.hub import card_of_training
    from rrhf.training.stage import train_model

    policies.release()  # free the sampling weights
    saved = partial(card_of_training, token=config.train.hub_token)
    watch = config.watch.filled(run.held_out, config.evaluate_rewards.reward)
    train_model(run.scored, config.model, config.train, config.adapter, watch=watch, saved=saved)


def _evaluated(run: RunFolder, config: RunConfig) -> dict[str, ModelSettings]:
    return {"rho": config.model, "pi": replace(config.model, model=str(run.model))}


def _evaluation_context(config: RunConfig) -> RewardContext:
    return reward_context(
        config.model,
        config.evaluate_sampling,
        config.text,
        config.evaluate,
        config.evaluate_remote,
        config.scoring.reference_model,
    )


def _check_evaluation(run: RunFolder, config: RunConfig) -> None:
    """Refuse, before any work, what would end the evaluation after all of it."""
    from rrhf.evaluation.perplexity import refuse_short_context
    from rrhf.evaluation.stage import refuse_unusable

    refuse_unusable(config.evaluate_rewards, config.evaluate_sampling, _evaluation_context(config))
    refuse_short_context(config.evaluate.judge(_evaluated(run, config)), config.evaluate_sampling.max_new_tokens)


def _evaluate(run: RunFolder, config: RunConfig, policies: PolicyCache) -> None:
    evaluate_models(
        run.held_out,
        run.evaluation,
        _evaluated(run, config),
        config.evaluate_rewards,
        config.evaluate_sampling,
        config.text,
        config.evaluate,
        context=_evaluation_context(config),
        policies=policies,
    )
