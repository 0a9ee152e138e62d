"""The paper's workflow in a run folder: sample once, score, train, evaluate, report. Run again, it goes on."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.files import write_text
from rrhf.common.imports import load_function
from rrhf.common.presentation import describe_counts
from rrhf.common.settings import refuse_other_settings
from rrhf.evaluation.stage import evaluate_models
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings
from rrhf.recipes.config import DataSettings, RunConfig
from rrhf.records.files import write_records
from rrhf.records.formats import load_dataset_records
from rrhf.records.record import Record, record_from_row
from rrhf.report.card import write_card
from rrhf.rewards.stage import score_file
from rrhf.training.folder import is_trained

log = logging.getLogger("rrhf")

SOURCE_USAGE = "a function f(limit, seed) that returns records"
FREE = ("train.watch_", "train.alarm")  # what these set changes no result: a run may go on with others


class RunFolder:
    """The files of a run; they mirror the data flow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.queries = folder / "queries.jsonl"
        self.held_out = folder / "held_out.jsonl"
        self.responses = folder / "responses.jsonl"
        self.scored = folder / "scored.jsonl"
        self.model = folder / "model"
        self.evaluation = folder / "evaluation.json"
        self.report = folder / "report.html"
        self.timings = folder / "timings.json"
        self.log = folder / "log.txt"


def remember_config(run: RunFolder, config: dict[str, Any], overwrite: bool = False) -> None:
    """Write the configuration into the run folder; refuse to go on with a run that had another.

    Raises:
        UserError: the folder holds a run of another configuration; the message says where they differ.
    """
    import yaml

    if run.config.exists() and not overwrite:
        found = _flat(yaml.safe_load(run.config.read_text(encoding="utf-8")))
        wanted = _flat(config)
        bound = [{key: value for key, value in flat.items() if not key.startswith(FREE)} for flat in (found, wanted)]
        cure = f"go on with `rrhf run {run.config} --output {run.folder}`, or choose another --output"
        refuse_other_settings(bound[0], bound[1], f"{run.folder} holds a run of another configuration", cure)
        if found == wanted:
            return
    if not run.config.exists() and any(path.exists() for path in (run.queries, run.scored, run.model)):
        raise UserError(f"{run.folder} has a run's files but no config.yaml: choose another --output")
    write_text(run.config, yaml.safe_dump(config, allow_unicode=True, sort_keys=False))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()}


def run_offline(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Bring the run to its end, stage by stage; a stage whose file is complete is not done again.

    Returns:
        The content of ``evaluation.json``.
    """
    from rrhf.report import write_report

    policies = PolicyCache()
    stages: list[tuple[str, Path, Callable[[], object]]] = [
        ("data", run.held_out, lambda: _write_data(run, config.data)),
        ("sample", run.responses, lambda: _sample(run, config, policies)),
        ("score", run.scored, lambda: score_file(run.responses, run.scored, config.score)),
        ("train", run.model, lambda: _train(run, config, policies)),
        ("evaluate", run.evaluation, lambda: _evaluate(run, config, policies)),
    ]
    for name, result, stage in stages:
        if result.exists() and (name != "train" or is_trained(run.model)):
            log.info(f"{name}: {result.name} is complete")
            shutil.rmtree(result.with_name(result.name + ".parts"), ignore_errors=True)  # stopped while clearing up
            continue
        log.info(f"{name}: begins")
        with _timed(run, name):
            stage()
    write_card(run.model, refresh=True)  # now with the evaluation
    with _timed(run, "report"):
        write_report([run.folder], run.report)
    evaluation: dict[str, Any] = json.loads(run.evaluation.read_text(encoding="utf-8"))
    return evaluation


class _timed:  # noqa: N801 - reads as a statement
    """Add a stage's seconds to timings.json, also those of attempts that were stopped."""

    def __init__(self, run: RunFolder, stage: str) -> None:
        self.place, self.stage = run.timings, stage

    def __enter__(self) -> None:
        self.begin = time.monotonic()

    def __exit__(self, *error: object) -> None:
        timings = json.loads(self.place.read_text(encoding="utf-8")) if self.place.exists() else {}
        timings[self.stage] = round(timings.get(self.stage, 0.0) + time.monotonic() - self.begin, 2)
        write_text(self.place, json.dumps(timings, indent=1) + "\n")


def _source(source: str, settings: DataSettings, limit: int | None, counts: Counter[str]) -> Iterator[Record]:
    if ":" in source and not Path(source).exists() and "/" not in source:
        rows: Iterable[Any] = load_function(source, "data source", SOURCE_USAGE)(limit=limit, seed=settings.seed)
        return (row if isinstance(row, Record) else record_from_row(row, source) for row in rows)
    return load_dataset_records(source, settings.format, settings.split, limit, counts)


def _write_data(run: RunFolder, settings: DataSettings) -> None:
    """queries.jsonl and, written last, held_out.jsonl; no query stands in both."""
    counts: Counter[str] = Counter()
    wanted = None if settings.limit is None else settings.limit
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
    taken = {json.dumps(record.query) for record in held_out}
    fresh = (record for record in chain([first], records) if json.dumps(record.query) not in taken)
    if not settings.provided:
        fresh = (record.without_responses() for record in fresh)
    count = write_records(run.queries, fresh, overwrite=True)
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
        sources=config.sources,
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


def _evaluate(run: RunFolder, config: RunConfig, policies: PolicyCache) -> None:
    models = {"rho": config.model, "pi": ModelSettings(**{**vars(config.model), "model": str(run.model)})}
    evaluate_models(
        run.held_out,
        run.evaluation,
        models,
        config.evaluate_rewards,
        config.evaluate_sampling,
        config.text,
        config.evaluate,
        policies=policies,
    )
