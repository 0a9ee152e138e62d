"""The paper's workflow in a run folder: sample once, score, train, evaluate, report. Run again, it goes on."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.imports import load_function
from rrhf.common.presentation import describe_counts
from rrhf.evaluation.stage import evaluate_models
from rrhf.models.cache import PolicyCache
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings
from rrhf.recipes.config import DataSettings, RunConfig
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.files import write_records
from rrhf.records.formats import load_dataset_records
from rrhf.records.parts import checksum_of_file
from rrhf.records.record import Record, record_from_row
from rrhf.report.card import write_card
from rrhf.rewards.stage import score_file
from rrhf.sampling.sources.parsing import parse_source
from rrhf.training.folder import is_trained, last_checkpoint

log = logging.getLogger("rrhf")

SOURCE_USAGE = "a function f(limit, seed) that returns records"


@dataclass(frozen=True)
class Stage:
    """One arrow of the data flow.

    ``inputs``: what the result depends on beside the settings, each with a digest. ``work`` makes the result.
    """

    name: str
    result: Path
    inputs: Callable[[], dict[str, str]]
    work: Callable[[], object]

    def is_complete(self) -> bool:
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
        Stage("data", run.held_out, lambda: _local_data(config.data), lambda: _write_data(run, config.data)),
        Stage(
            "sample",
            run.responses,
            lambda: {**files(run.queries), **_sampled(config)},
            lambda: _sample(run, config, policies),
        ),
        Stage(
            "score",
            run.scored,
            lambda: files(run.responses),
            lambda: score_file(run.responses, run.scored, config.score),
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
            lambda: {**files(run.held_out), **models(), run.model.name: model_digest(str(run.model))},
            lambda: _evaluate(run, config, policies),
        ),
    ]


def _local_data(settings: DataSettings) -> dict[str, str]:
    """The checksums of the data files on this machine that a run's queries come from."""
    paths = [Path(name) for name in (settings.source, settings.held_out) if name is not None]
    return {str(path): checksum_of_file(path) for path in paths if path.is_file()}


def _sampled(config: RunConfig) -> dict[str, str]:
    """The digests of the models and files that responses come from; nobody knows a server's."""
    if config.sample is None:
        return {}
    if not config.sources.source:
        return {config.model.model: model_digest(config.model.model)}
    sources = [parse_source(written) for written in config.sources.source]
    files = {source.name: checksum_of_file(Path(source.name)) for source in sources if source.kind == "file"}
    return files | {source.name: model_digest(source.name) for source in sources if source.kind in ("local", "vllm")}


def _source(source: str, settings: DataSettings, limit: int | None, counts: Counter[str]) -> Iterator[Record]:
    if ":" in source and not Path(source).exists() and "/" not in source:
        rows: Iterable[Any] = load_function(source, "data source", SOURCE_USAGE)(limit=limit, seed=settings.seed)
        return (row if isinstance(row, Record) else record_from_row(row, source) for row in rows)
    return load_dataset_records(source, settings.format, settings.split, limit, counts)


def _write_data(run: RunFolder, settings: DataSettings) -> None:
    """queries.jsonl and, written last, held_out.jsonl; no query stands in both."""
    counts: Counter[str] = Counter()
    wanted = settings.limit
    if settings.held_out is not None:
        held_out = list(_source(settings.held_out, settings, settings.held_out_limit, counts))
        records = _source(settings.source, settings, wanted, counts)
    else:
        both = _source(settings.source, settings, None if wanted is None else wanted + settings.held_out_limit, counts)
        held_out = list(islice(both, settings.held_out_limit))
        records = both
    first = next(records, None)
    if first is None or not held_out:
        raise UserError(
            f"data: {settings.source} has too few records: {len(held_out)} are held out and "
            f"{'none is' if first is None else 'some are'} left to train on; lower data.held_out_limit"
        )
    held_out_queries = {json.dumps(record.query) for record in held_out}
    training = (record for record in chain([first], records) if json.dumps(record.query) not in held_out_queries)
    if not settings.provided:
        training = (record.without_responses() for record in training)
    count = write_records(run.queries, training, overwrite=True)
    write_records(run.held_out, held_out, overwrite=True)
    dropped = describe_counts(counts)
    log.info(f"data: {count} queries to train on, {len(held_out)} held out{'; ' + dropped if dropped else ''}")


def _sample(run: RunFolder, config: RunConfig, policies: PolicyCache) -> None:
    if config.sample is None:
        from rrhf.records.files import read_records

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


def _train(run: RunFolder, config: RunConfig, policies: PolicyCache) -> None:
    from rrhf.report.hub import card_of_training
    from rrhf.training.stage import train_model

    policies.release()  # free the sampling weights
    saved = partial(card_of_training, token=config.train.hub_token)
    watch = config.watch.filled(run.held_out, config.evaluate_rewards.reward)
    train_model(run.scored, config.model, config.train, config.adapter, watch=watch, saved=saved)


def _evaluated(run: RunFolder, config: RunConfig) -> dict[str, ModelSettings]:
    return {"rho": config.model, "pi": replace(config.model, model=str(run.model))}


def _check_evaluation(run: RunFolder, config: RunConfig) -> None:
    """Refuse, before any work, what would end the evaluation after all of it."""
    from rrhf.evaluation.perplexity import refuse_short_context

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
        policies=policies,
    )
