"""The training stage: from a file of scored records to a model folder, with checkpoints, signals and a summary."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from rrhf.adapters import AdapterSettings, is_adapter, load_policy_or_adapter, load_quantised, merged, peft_config
from rrhf.errors import UserError
from rrhf.files import write_text
from rrhf.launch import warn_of_whole_weights
from rrhf.models import ModelSettings
from rrhf.precision import has_low_precision
from rrhf.progress import Progress
from rrhf.publishing.card import look_at, write_card
from rrhf.publishing.hub import push_card
from rrhf.records import read_records
from rrhf.stages import TRAINED, is_trained
from rrhf.trainer import ADAPTER_LEARNING_RATE, RRHFConfig, RRHFTrainer
from rrhf.watching import WatchSettings, watch_training

log = logging.getLogger("rrhf")

SETTINGS = "training-settings.json"

# What a resumed run may change without becoming another run.
FREE = {"output_dir", "logging_steps", "save_steps", "save_total_limit", "disable_tqdm", "report_to", "run_name",
        "logging_dir", "overwrite", "eval_steps", "eval_strategy", "max_tokens_per_forward"}  # fmt: skip


class Stopped(Exception):  # noqa: N818 - it is no error
    """A signal stopped the training after a checkpoint was written; ``code`` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM: finish the optimiser step, write a checkpoint, stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signal is not None:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        def remember(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt  # asked twice: at once, from the last checkpoint
            self.signal = number
            log.info("stopping after this step; a checkpoint is written first (once more to stop at once)")

        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _ShowProgress(TrainerCallback):
    """A bar over the optimiser steps, and the metrics as lines, in place of transformers' dictionaries."""

    bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = Progress("train", state.max_steps, "steps", done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.count)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "train_runtime" not in logs:
            values = "  ".join(f"{name} {value:.4g}" for name, value in logs.items() if name != "epoch")
            with self.bar.set_aside():
                log.info(f"step {state.global_step}/{state.max_steps}  {values}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None


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
) -> dict[str, Any]:
    """Train ``model`` on the scored records of ``data`` and write it to ``config.output_dir``.

    A folder that holds checkpoints of the same settings is continued.

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
        if not adapter.merge_adapter and is_adapter(model.model):
            raise UserError(
                f"--merge_adapter false: {model.model} is an adapter itself, and its sum with its base, on which the "
                "new one would stand, is saved nowhere: leave --merge_adapter true"
            )
    with _claimed(folder, config, overwrite):
        return _train(folder, data, model, config, adapter, eval_data, callbacks, watch or WatchSettings())


def _train(
    folder: Path,
    data: Path,
    model: ModelSettings,
    config: RRHFConfig,
    adapter: AdapterSettings,
    eval_data: Path | None,
    callbacks: list[TrainerCallback] | None,
    watch: WatchSettings,
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
    trainer.add_callback(_ShowProgress)
    watching = watch_training(trainer, watch, model)
    if watching is not None:
        trainer.add_callback(watching)
    stop = _StopOnSignal()
    trainer.add_callback(stop)
    with stop.listening(), _full_disk_said(folder):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if stop.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(128 + stop.signal)
    if watching is not None and watching.stopped is not None:
        raise UserError(watching.stopped)
    if adapter.peft is not None and adapter.merge_adapter:
        trainer.model = merged(trainer.model, model, quantised=adapter.peft == "qlora")
    if trainer.is_fsdp_enabled:  # checkpoints may be sharded; the result is one folder of whole weights
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with _full_disk_said(folder):
        trainer.save_model(str(folder))
    summary = {
        "settings": settings,
        "records": len(trainer.train_dataset),
        "data": look_at(data),
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
        write_card(folder, training=summary)
        if config.push_to_hub:
            push_card(folder, trainer.hub_model_id, config.hub_token)
        write_text(folder / TRAINED, json.dumps(summary, indent=2) + "\n")
        if config.save_total_limit is None:
            for old in folder.glob("checkpoint-*"):
                shutil.rmtree(old)
    return summary


@contextmanager
def _claimed(folder: Path, config: RRHFConfig, overwrite: bool) -> Iterator[None]:
    """Keep other trainings out of ``folder`` while this one works there; with ``overwrite`` empty it first.

    Processes that are not connected with this one, whatever started them, are met here too.
    """
    if config.process_index != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # the folder itself: no file is left behind, and a dead process holds nothing
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another process trains into this folder. Wait for it, choose another --output, or, if they "
                "were to train together, start them with torchrun (docs/distributed.md)"
            ) from error
        except OSError:
            log.warning(f"{folder}: this file system has no locks: see that nothing else trains into it")
        for old in folder.iterdir() if overwrite else ():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()
        yield
    finally:
        os.close(lock)


@contextmanager
def _full_disk_said(folder: Path) -> Iterator[None]:
    """Turn what a full disk makes safetensors and torch raise, each in its own type, into a message."""
    try:
        yield
    except Exception as error:
        signs = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
        if not any(sign in str(error) for sign in [*signs, "PytorchStreamWriter failed writing"]):
            raise
        raise UserError(
            f"{folder}: the weights cannot be written: {error}. Earlier checkpoints are untouched: free some space, "
            "then run the same command again"
        ) from error


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written whole: its ``trainer_state.json``, which comes last, stands and parses."""

    def whole(checkpoint: Path) -> bool:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return True

    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    found.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
    return next((str(path) for path in found if whole(path)), None)


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
        different = [name for name in sorted(settings | found) if settings.get(name) != found.get(name)]
        if different:
            changes = "; ".join(f"{name} was {found.get(name)!r}, is {settings.get(name)!r}" for name in different)
            raise UserError(
                f"{folder} holds a training run with other settings ({changes}): run with those to go on, "
                "or give --overwrite to train anew"
            )
    else:
        write_text(place, json.dumps(settings, indent=1) + "\n")
    return settings
