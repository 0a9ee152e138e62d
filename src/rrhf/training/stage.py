"""The training stage: from a file of scored records to a model folder, with checkpoints, signals and a summary."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from rrhf.common.errors import UserError
from rrhf.common.files import write_text
from rrhf.common.launch import warn_of_whole_weights
from rrhf.common.settings import refuse_other_settings
from rrhf.models.adapters import (
    AdapterSettings,
    load_policy_or_adapter,
    load_quantised,
    merged,
    peft_config,
)
from rrhf.models.load import ModelSettings
from rrhf.models.locate import locate
from rrhf.records.files import read_records
from rrhf.records.sources import source_shares
from rrhf.training.alarms import WatchSettings
from rrhf.training.callbacks import ShowProgress, StopOnSignal, Stopped
from rrhf.training.config import ADAPTER_LEARNING_RATE, RRHFConfig
from rrhf.training.folder import FREE, SETTINGS, TRAINED, claimed, is_trained, last_checkpoint, naming_full_disk
from rrhf.training.master_weights import has_low_precision
from rrhf.training.trainer import RRHFTrainer
from rrhf.training.watching import watch_training

log = logging.getLogger("rrhf")

# The folder, the summary, and the repository on the hub where --push_to_hub made one.
Saved = Callable[[Path, dict[str, Any], str | None], object]


def train_model(
    data: Path,
    model: ModelSettings,
    config: RRHFConfig,
    adapter: AdapterSettings,
    *,
    eval_data: Path | None = None,
    overwrite: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    watch: WatchSettings | None = None,
    saved: Saved | None = None,
) -> dict[str, Any]:
    """Train ``model`` on the scored records of ``data`` and write it to ``config.output_dir``.

    A folder that holds checkpoints of the same settings is continued. ``saved`` is called when the weights are
    written and before the folder counts as complete, so that what it writes there is not missing from a complete one.

    Returns:
        The summary that stands in ``training.json``.

    Raises:
        UserError: the folder is complete already, or holds a run with other settings; or an alarm of ``watch`` stopped
            the training, after a checkpoint.
        Stopped: a signal came; everything up to the last step is kept.
    """
    folder = Path(str(config.output_dir))
    if adapter.peft is not None:
        if config.learning_rate_by_default:
            config.learning_rate = ADAPTER_LEARNING_RATE
        if not adapter.merge_adapter and locate(model.model).adapter is not None:
            raise UserError(
                f"--merge_adapter false: {model.model} is an adapter itself, and its sum with its base, on which the "
                "new one would stand, is saved nowhere: leave --merge_adapter true"
            )
    with claimed(folder, config, overwrite):
        return _train(folder, data, model, config, adapter, eval_data, callbacks, watch or WatchSettings(), saved)


def _train(
    folder: Path,
    data: Path,
    model: ModelSettings,
    config: RRHFConfig,
    adapter: AdapterSettings,
    eval_data: Path | None,
    callbacks: list[TrainerCallback] | None,
    watch: WatchSettings,
    saved: Saved | None,
) -> dict[str, Any]:
    with config.main_process_first(local=False):
        if is_trained(folder):
            raise UserError(f"{folder} holds a finished model: give --overwrite to train anew, or another --output")
        settings = _remember_settings(folder, data, model, config, adapter)
    if adapter.peft == "qlora":
        policy, tokenizer = load_quantised(model)
    else:
        policy, tokenizer = load_policy_or_adapter(model, training=True)
    trainer = RRHFTrainer(
        model=policy,
        args=config,
        train_dataset=read_records(data, require="scores", empty_responses="drop"),
        eval_dataset=None if eval_data is None else read_records(eval_data, require="scores", empty_responses="drop"),
        processing_class=tokenizer,
        peft_config=peft_config(adapter),
        callbacks=callbacks,
    )
    precision = "bfloat16 autocast" if config.bf16 else "float16 autocast" if config.fp16 else "no autocast"
    if has_low_precision(trainer.model):
        precision = "fp32 masters in the optimiser"
    log.info(f"train: {trainer.train_dataset.summary()}")
    log.info(f"train: {policy.dtype} weights, {precision}, {trainer.path} pass, {config.world_size} process(es)")
    warn_of_whole_weights(str(trainer.accelerator.distributed_type))
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        log.info(f"train: going on from {checkpoint}")
    if adapter.peft is not None and adapter.merge_adapter and trainer.is_fsdp_enabled:
        raise UserError("an adapter cannot be merged into sharded weights: give --merge_adapter false")
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(ShowProgress)
    watching = watch_training(trainer, watch, model)
    if watching is not None:
        trainer.add_callback(watching)
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with stop.listening(), naming_full_disk(folder):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if stop.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(128 + stop.signal)
    if watching is not None and watching.stopped is not None:
        raise UserError(watching.stopped)
    if adapter.peft is not None and adapter.merge_adapter:
        trainer.model = merged(trainer.model, model, quantised=adapter.peft == "qlora")
    if trainer.is_fsdp_enabled:  # checkpoints may be sharded; the result is one folder of whole weights
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with naming_full_disk(folder):
        trainer.save_model(str(folder))
    summary = {
        "settings": settings,
        "records": len(trainer.train_dataset),
        "data": source_shares(data),
        "skipped": dict(trainer.train_dataset.skipped),
        "unranked": trainer.train_dataset.unranked,
        "queries_cut": trainer.train_dataset.queries_cut,
        "responses_cut": trainer.train_dataset.responses_cut,
        "path": trainer.path,
        "precision": precision,
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
    }
    if trainer.is_world_process_zero():
        trainer.save_state()
        if saved is not None:
            saved(folder, summary, trainer.hub_model_id if config.push_to_hub else None)
        write_text(folder / TRAINED, json.dumps(summary, indent=2) + "\n")
        if config.save_total_limit is None:
            for old in folder.glob("checkpoint-*"):
                shutil.rmtree(old)
    return summary


def _remember_settings(
    folder: Path, data: Path, model: ModelSettings, config: RRHFConfig, adapter: AdapterSettings
) -> dict[str, Any]:
    """Write down what this run is; refuse to go on with a run that was another."""
    everything = {**json.loads(config.to_json_string()), **asdict(adapter), "model": model.model, "data": str(data)}
    everything["dtype"] = model.dtype
    if config.bf16_by_default:
        del everything["bf16"]
    settings = {name: value for name, value in sorted(everything.items()) if name not in FREE and value is not None}
    place = folder / SETTINGS
    if place.exists():
        found = json.loads(place.read_text(encoding="utf-8"))
        cure = "run with those to go on, or give --overwrite to train anew"
        refuse_other_settings(found, settings, f"{folder} holds a training run with other settings", cure)
    else:
        write_text(place, json.dumps(settings, indent=1) + "\n")
    return settings
