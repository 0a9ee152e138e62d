"""The training stage: from a file of scored records to a model folder, with checkpoints, signals and a summary."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import IntervalStrategy, PrinterCallback, ProgressCallback, TrainerCallback

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.environment import environment
from rrhf.common.errors import UserError
from rrhf.common.files import read_object, write_text
from rrhf.common.imports import code_digest
from rrhf.common.launch import warn_of_whole_weights
from rrhf.common.presentation import describe_counts
from rrhf.common.remote import origin
from rrhf.common.settings import refuse_other_settings
from rrhf.losses import PRESETS, ranking_loss
from rrhf.models.adapters import (
    AdapterSettings,
    load_policy_or_adapter,
    load_quantised,
    merged,
    name_base,
    peft_config,
    refuse_lost_base,
)
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings
from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import NOTHING_LEFT, read_records
from rrhf.records.record import Record
from rrhf.records.sources import source_shares
from rrhf.training.callbacks import LogAtSaves, Seal, ShowProgress, StopOnSignal, Stopped, mean_loss
from rrhf.training.config import ADAPTER_LEARNING_RATE, RRHFConfig
from rrhf.training.folder import (
    BUDGET,
    FREE,
    INPUTS,
    NAMED,
    SETTINGS,
    begun,
    claimed,
    complete,
    last_checkpoint,
    naming_full_disk,
)
from rrhf.training.master_weights import has_low_precision, takes_masters
from rrhf.training.memory import MemoryPlan
from rrhf.training.online import Online, OnlineRecords
from rrhf.training.reference import Reference, reference_column, with_reference_sums
from rrhf.training.trainer import RRHFTrainer
from rrhf.training.watch_settings import WatchSettings
from rrhf.training.watching import Watch, watch_training
from rrhf.training.windows import last_window, window_seconds

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
    watch_remote: EndpointLimits | None = None,
    saved: Saved | None = None,
    online: Online | None = None,
) -> dict[str, Any]:
    """Train ``model`` on the scored records of ``data`` and write it to ``config.output_dir``.

    With ``online`` (OP-k) the data need only have queries: their responses are sampled while the policy trains.
    A folder that holds checkpoints of the same settings is continued, also with ``overwrite``. ``watch_remote``: how
    servers are asked about what is watched, and what they may cost. ``saved`` is called when the weights are written
    and before the folder counts as complete, so that what it writes there is not missing from a complete one.

    Returns:
        The summary that stands in ``training.json``.

    Raises:
        UserError: the folder is complete already, or holds a run with other settings; or an alarm of ``watch`` stopped
            the training, after a checkpoint.
        Stopped: a signal came; everything up to the last step is kept.
    """
    folder = Path(str(config.output_dir))
    model = _settle(model, config, adapter, eval_data)
    job = Job(
        folder, data, eval_data, model, config, adapter, watch or WatchSettings(), callbacks or [], online,
        watch_remote=watch_remote or EndpointLimits(),
    )  # fmt: skip
    with claimed(folder, config):
        with config.main_process_first(local=False):
            settings = begun(folder, config, overwrite, lambda: _remember_settings(job))
        job = replace(job, reference=_reference(job))  # before the policy is in memory
        training = _build(job, *_load(job))
        settings = _remember_budget(job, settings)
        log.info(f"train: {training.trainer.memory_plan().line()}")
        with training.stop.listening():
            loss = _run(job, training)
            return _save(job, training, settings, loss, saved)


def plan_training(
    data: Path,
    model: ModelSettings,
    config: RRHFConfig,
    adapter: AdapterSettings,
    *,
    eval_data: Path | None = None,
    online: Online | None = None,
) -> MemoryPlan:
    """What ``train_model`` would need against what the device has; nothing is trained, and nothing written.

    Raises:
        UserError: as ``train_model`` does for what it loads and reads.
    """
    with TemporaryDirectory() as folder:
        config.output_dir, config.push_to_hub = folder, False
        model = _settle(model, config, adapter, eval_data)
        job = Job(Path(folder), data, eval_data, model, config, adapter, WatchSettings(), [], online)
        plan: MemoryPlan = _build(job, *_load(job)).trainer.memory_plan()
        return plan


def _settle(
    model: ModelSettings, config: RRHFConfig, adapter: AdapterSettings, eval_data: Path | None
) -> ModelSettings:
    """Settle in ``config`` what depends on the other settings; returns the model's with the device that is taken."""
    if config.resume_from_checkpoint:
        raise UserError("--resume_from_checkpoint: leave it out: the same command goes on from the last checkpoint")
    if eval_data is not None and config.eval_strategy == IntervalStrategy.NO:
        config.eval_strategy = IntervalStrategy.STEPS
        config.eval_steps = config.eval_steps or config.logging_steps
    if eval_data is None and config.eval_strategy != IntervalStrategy.NO:
        raise UserError(f"--eval_strategy {config.eval_strategy.value}: nothing is held out: give --eval_data")
    if adapter.peft is not None and config.learning_rate_by_default:
        config.learning_rate = ADAPTER_LEARNING_RATE
    refuse_lost_base(adapter, model.model)
    return replace(model, device=str(config.place(model.device)))


@dataclass(frozen=True)
class Job:
    """What is asked for."""

    folder: Path
    data: Path
    eval_data: Path | None
    model: ModelSettings
    config: RRHFConfig
    adapter: AdapterSettings
    watch: WatchSettings
    callbacks: Sequence[TrainerCallback]
    online: Online | None
    reference: Reference | None = None
    watch_remote: EndpointLimits = field(default_factory=EndpointLimits)

    @property
    def merges(self) -> bool:
        """Whether the adapter is added to the weights at the end."""
        return self.adapter.peft is not None and self.adapter.merge_adapter


@dataclass(frozen=True)
class Training:
    """What was built for it. ``precision`` says in words what computes in what."""

    trainer: RRHFTrainer
    precision: str
    watch: Watch | None
    stop: StopOnSignal


def _load(job: Job) -> tuple[Any, Any]:
    """The policy and its tokenizer."""
    if job.adapter.peft == "qlora":
        return load_quantised(job.model)
    return load_policy_or_adapter(job.model, training=True)


def _reference(job: Job) -> Reference | None:
    """The reference's sums of the records, computed where they are not known; samples get theirs when they come."""
    if job.online is not None:
        return None
    files = [file for file in (job.data, job.eval_data) if file is not None]
    return with_reference_sums(files, job.model, job.config, job.folder)


def _build(job: Job, policy: Any, tokenizer: Any) -> Training:
    """The trainer with its records and callbacks."""
    config, dropped = job.config, Counter[str]()

    def records(file: Path, counts: Counter[str] | None = None) -> Iterator[Record]:
        place = file if job.reference is None else job.reference.files[file]
        if place != file and counts is not None:  # what the copy with the reference's sums has left out already
            deque(read_records(file, empty_responses="drop", counts=counts), maxlen=0)
        return read_records(place, require="scores", empty_responses="drop", counts=counts)

    trainer = RRHFTrainer(
        model=policy,
        args=config,
        train_dataset=_training_data(job, records, dropped),
        eval_dataset=None if job.eval_data is None else records(job.eval_data),
        processing_class=tokenizer,
        peft_config=peft_config(job.adapter),
        callbacks=list(job.callbacks),
        reference_sums=None if job.reference is None else job.reference.column,
    )
    precision = "bfloat16 autocast" if config.bf16 else "float16 autocast" if config.fp16 else "no autocast"
    if takes_masters(trainer):
        precision = "fp32 masters in the optimiser" + (f", {precision}" if config.fp16 else "")
    elif has_low_precision(trainer.model):
        precision = f"made float32 by FSDP, {precision}"
    log.info(f"train: {trainer.train_dataset.summary()}" + (f"; {describe_counts(dropped)}" if dropped else ""))
    if dropped[NOTHING_LEFT]:
        trainer.train_dataset.skipped[NOTHING_LEFT] += dropped[NOTHING_LEFT]
    log.info(
        f"train: {policy.dtype} weights, {precision}, {trainer.path} pass, "
        f"{config.max_tokens_per_forward} tokens a forward, {config.world_size} process(es)"
    )
    taken = [f"--{name} {value}" for name, value in _preset(config).items()]
    if taken:
        log.info(f"train: {config.ranking_loss} as in its paper: {', '.join(taken)} (docs/losses.md)")
    for sentence in config.unread():
        log.warning(f"train: {sentence}")
    warn_of_whole_weights(str(trainer.accelerator.distributed_type))
    if config.interpolation < 1 and job.adapter.peft is not None and not job.adapter.merge_adapter:
        raise UserError(f"--interpolation {config.interpolation}: is of whole weights: give --merge_adapter true")
    if job.merges and trainer.is_fsdp_enabled:
        raise UserError("an adapter cannot be merged into sharded weights: give --merge_adapter false")
    for replaced in (ProgressCallback, PrinterCallback):  # by ShowProgress
        trainer.remove_callback(replaced)
    trainer.add_callback(ShowProgress)
    watch = watch_training(trainer, job.watch, job.model, job.watch_remote)
    if watch is not None:
        trainer.add_callback(watch)
    trainer.add_callback(Seal())
    stop = StopOnSignal()
    trainer.add_callback(stop)
    trainer.add_callback(LogAtSaves())
    return Training(trainer, precision, watch, stop)


def _training_data(
    job: Job, records: Callable[[Path, Counter[str]], Iterator[Record]], dropped: Counter[str]
) -> Iterator[Record] | OnlineRecords:
    """The records to train on; ``dropped`` counts what reading them leaves out."""
    if job.online is None:
        return records(job.data, dropped)
    return OnlineRecords(read_records(job.data, empty_responses="drop", counts=dropped), job.online)


def _run(job: Job, training: Training) -> float:
    """Train, from the last checkpoint if there is one; returns the mean loss."""
    trainer, stop, watch = training.trainer, training.stop, training.watch
    checkpoint = last_checkpoint(job.folder, check=True)
    if checkpoint is not None:
        log.info(f"train: going on from {checkpoint}")
    records = trainer.train_dataset
    held = closing(records) if isinstance(records, OnlineRecords) else nullcontext()
    with naming_full_disk(job.folder), held:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if stop.agreed is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(128 + stop.agreed)
    if watch is not None and watch.stopped is not None:
        raise UserError(watch.stopped)
    return mean_loss(trainer.state.log_history, float(result.training_loss))


def _save(
    job: Job, training: Training, settings: dict[str, Any], train_loss: float, saved: Saved | None
) -> dict[str, Any]:
    """Write the weights, then the summary, which makes the folder complete."""
    trainer, folder = training.trainer, job.folder
    if job.merges:
        trainer.model = merged(trainer.model, job.model, quantised=job.adapter.peft == "qlora")
    if trainer.is_fsdp_enabled:  # checkpoints may be sharded; the result is one folder of whole weights
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if job.config.interpolation < 1 and trainer.is_world_process_zero():
        start, _ = load_policy_or_adapter(replace(job.model, device="cpu"), training=True)
        trainer.save_between(start.state_dict())
    with naming_full_disk(folder):
        trainer.save_model(str(folder))
        if job.adapter.peft is not None and not job.merges and trainer.is_world_process_zero():
            name_base(folder, job.model.model)
    records = trainer.train_dataset
    summary = {
        "settings": settings,
        "records": len(records),
        "data": source_shares(last_window(folder) or job.data),
        "skipped": dict(records.skipped),
        "unranked": records.unranked,
        "left_out": records.left_out,
        "queries_cut": records.queries_cut,
        "responses_cut": records.responses_cut,
        "path": trainer.path,
        "precision": training.precision,
        "steps": trainer.state.global_step,
        "train_loss": train_loss,
        "window_seconds": window_seconds(folder),
        "environment": environment(),
    }
    if trainer.is_world_process_zero():
        trainer.save_state()
        if saved is not None:
            saved(folder, summary, trainer.hub_model_id if job.config.push_to_hub else None)
        complete(folder, summary)
        if job.config.save_total_limit is None:
            for old in folder.glob("checkpoint-*"):
                shutil.rmtree(old)
    return summary


def _remember_settings(job: Job) -> dict[str, Any]:
    """Write down what this run is; refuse to go on with a run that was another."""
    everything = {**json.loads(job.config.to_json_string()), **asdict(job.adapter), **_inputs(job)}
    if job.online is not None:
        everything |= job.online.settings()
    if job.config.bf16_by_default:
        del everything["bf16"]
    settings = {name: value for name, value in sorted(everything.items()) if name not in FREE and value is not None}
    place = job.folder / SETTINGS
    if place.exists():
        before = read_object(place)
        budget = before.pop(BUDGET, None)
        unknown = FREE | {name for name in INPUTS if name not in before or name not in settings}
        # Where the contents are known, where they lie is of no interest.
        unknown |= {name for name, content in NAMED.items() if content in before and content in settings}
        refuse_other_settings(
            {name: value for name, value in before.items() if name not in unknown},
            {name: value for name, value in settings.items() if name not in unknown},
            f"{job.folder} holds a training run with other settings",
            "run with those to go on; to train anew give --overwrite or, in a run, remove that folder",
            of={content: settings.get(name) for name, content in NAMED.items()},
        )
        if job.config.max_tokens_per_forward is None:
            job.config.max_tokens_per_forward = budget  # as it was chosen: the numbers go on bit for bit
    else:
        write_text(place, json.dumps(settings, indent=1) + "\n")
    return settings


def _remember_budget(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """Write down how many tokens a forward pass has; another number is no other run."""
    settings = {**settings, BUDGET: job.config.max_tokens_per_forward}
    if job.config.process_index == 0:
        write_text(job.folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    return settings


def _inputs(job: Job) -> dict[str, str | None]:
    """Records and weights by name and by content: a checkpoint of others under the same name is another run's."""

    def checksum(file: Path | None) -> str | None:
        return checksum_of_file(file) if file is not None and file.is_file() else None  # reading it says what is wrong

    return {
        "data": origin(job.data),
        "data_checksum": checksum(job.data),
        "eval_data": None if job.eval_data is None else origin(job.eval_data),
        "eval_data_checksum": checksum(job.eval_data),
        "model": job.model.model,
        "model_digest": model_digest(job.model.model) or None,
        "dtype": job.model.dtype,
        "ranking_loss_code": _loss_code(job.config.ranking_loss),
        "reference_sums": reference_column(job.model, job.config),
        "processes": job.config.world_size,  # a step has so many times its queries: others are another training
    }


def _loss_code(name: str) -> str | None:
    """The digest of the code of somebody's own loss; ours are named."""
    return (code_digest(ranking_loss(name)) or None) if ":" in name else None


def _preset(config: RRHFConfig) -> dict[str, float | str]:
    """What the loss's name presets and nobody overruled."""
    preset = PRESETS.get(config.ranking_loss, {})
    return {name: value for name, value in preset.items() if getattr(config, name) == value}
