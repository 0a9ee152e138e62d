"""IP-n: sample → score → train in rounds, each from the model that the round before has trained (Table 1).

Every round has its own folder, ``rounds/N``, with the files of a run; queries and held-out prompts are shared. ρ, to
which reward, perplexity and KL are compared, stays the model that the first round began with. Random choices of round n
are made with the seed plus n − 1: with the same numbers a policy that has changed little would write the same again.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.files import write_text
from rrhf.common.launch import is_first, wait_for_first
from rrhf.common.yaml_text import read_yaml
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings
from rrhf.recipes.config import RunConfig, SourceSettings
from rrhf.recipes.offline import (
    Pass,
    Stage,
    carry_out,
    check_evaluation,
    data_stage,
    evaluate_stage,
    finish,
    loss_needs,
    sample_stage,
    score_stage,
    train_stage,
)
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.files import read_records, write_records

log = logging.getLogger("rrhf")


def run_iterated(run: RunFolder, config: RunConfig, policies: PolicyCache) -> dict[str, Any]:
    """Bring a run of ``config.rounds.iterations`` rounds to its end; what is complete is not done again.

    The results in the run's folder are links to those of the last round; the report shows all rounds.

    Returns:
        The content of the last round's ``evaluation.json``.

    Raises:
        UserError: the rounds cannot be iterated, or as ``run_offline``.
    """
    _refuse(run, config)
    last = config.rounds.iterations
    passes = list(_passes(run, config, policies))
    check_evaluation(passes[-1])
    carry_out([data_stage(Pass(run, config, config.model, policies))], run)
    for number, at in enumerate(passes, 1):
        log.info(f"round {number} of {last}: from {at.config.model.model}")
        _write_config(run, at, number)
        stages = [sample_stage(at), score_stage(at), train_stage(at)]
        carry_out(stages, at.run, run)
        carry_out(_evaluation(at, number, last), at.run, run)
    run.show(passes[-1].run)
    return finish(run, [at.run for at in passes])


def _refuse(run: RunFolder, config: RunConfig) -> None:
    """Refuse, before any work, what a second round could not be made of."""
    faults = []
    if run.model.exists() and not run.model.is_symlink():
        faults.append(f"{run.folder} holds a run without rounds: choose another --output")
    if config.sample is None:
        faults.append("sample: null: without samples every round would have the same responses: give iterations: 1")
    elif config.sources.source and _sources(config, "") == config.sources.source:
        faults.append(
            f"sample.source: none is the model {config.model.model} itself, so no round would sample from the one "
            f"that was trained: name {config.model.model}@POLICY:N among them"
        )
    if config.adapter.peft is not None and not config.adapter.merge_adapter:
        faults.append("train.merge_adapter: false: the next round is trained on the sum: leave it out")
    if faults:
        raise UserError("iterations:\n  " + "\n  ".join(faults))


def _passes(run: RunFolder, config: RunConfig, policies: PolicyCache) -> Iterator[Pass]:
    model = config.model
    for number in range(1, config.rounds.iterations + 1):
        folder = run.round(number)
        yield Pass(folder, _of_round(config, number, model, folder), config.model, policies)
        model = replace(config.model, model=str(folder.model))


def _of_round(config: RunConfig, number: int, model: ModelSettings, folder: RunFolder) -> RunConfig:
    """The settings of a round that begins with ``model``."""
    assert config.sample is not None
    train, watch = copy.copy(config.train), config.watch  # a training settles what is open in its settings
    train.output_dir, train.seed = str(folder.model), train.seed + number - 1
    train.push_to_hub = train.push_to_hub and number == config.rounds.iterations
    if number > 1 and any("reference" in name for name in loss_needs(config)):
        train.reference_model = train.reference_model or config.model.model
    if number > 1 and watch.watch_steps and config.adapter.peft is None:
        watch = replace(watch, watch_perplexity_model=watch.watch_perplexity_model or config.model.model)
    return replace(
        config,
        model=model,
        sample=replace(config.sample, seed=config.sample.seed + number - 1),
        sources=SourceSettings(_sources(config, model.model)),
        scoring=replace(config.scoring, model=model.model),  # π of a KL term; its ρ stays
        train=train,
        watch=watch,
    )


def _sources(config: RunConfig, model: str) -> list[str]:
    """The sources of a round: where the first model is named, ``model`` stands in its place."""
    first = f"{config.model.model}@"
    return [
        f"{model}@{written.removeprefix(first)}" if written.startswith(first) else written
        for written in config.sources.source
    ]


def _write_config(run: RunFolder, at: Pass, number: int) -> None:
    """Note what the round is, as the configuration of a run of its own."""
    import yaml

    values = read_yaml(run.config) if run.config.exists() else {}
    for name in ("iterations", "evaluate_rounds"):
        values.pop(name, None)
    assert at.config.sample is not None
    begins_with = at.config.model.model  # the run's own model by its place in the run, which may move
    values["model"] = begins_with.removeprefix(f"{run.folder}{os.sep}") if number > 1 else begins_with
    values["sample"] = {**(values.get("sample") or {}), "seed": at.config.sample.seed}
    values["train"] = {**(values.get("train") or {}), "seed": at.config.train.seed}
    text = f"# Round {number} of {run.folder.name}\n" + yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
    if not at.run.config.exists() or at.run.config.read_text(encoding="utf-8") != text:
        write_text(at.run.config, text)


def _evaluation(at: Pass, number: int, last: int) -> list[Stage]:
    """The evaluation of a round: of the last one on all held-out prompts, of the others on a few, if asked for."""
    if number == last:
        return [evaluate_stage(at)]
    few, prompts = at.config.rounds.evaluate_rounds, at.run.folder / at.run.held_out.name
    if not few or (at.run.evaluation.exists() and not prompts.exists()):  # the latter: it was the last one once
        return []
    if is_first() and number > 1:  # what ρ wrote to them is known
        for name in ("evaluation.rho.jsonl", "evaluation.rho.made-of.json"):
            known, here = at.run.folder.parent / str(number - 1) / name, at.run.folder / name
            if known.exists() and not here.exists():
                shutil.copyfile(known, here)
    if is_first() and not prompts.exists():
        write_records(prompts, islice(read_records(at.run.held_out), few))
    wait_for_first(prompts.exists)
    return [evaluate_stage(at, prompts)]
