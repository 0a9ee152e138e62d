"""The stage that trains a reward model: from scored records to a folder that ``--reward`` takes, and how good it is."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, ProgressCallback, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rrhf.common.errors import UserError
from rrhf.common.files import read_object, write_text
from rrhf.common.settings import refuse_other_settings
from rrhf.common.svg import INK, inline_svg
from rrhf.evaluation.ranking import ranking_report
from rrhf.models.devices import resolve_dtype
from rrhf.models.folders import no_folder
from rrhf.models.identity import model_digest
from rrhf.models.load import FLEX, ModelSettings, attention_options, context_length
from rrhf.models.locate import locate
from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import read_records
from rrhf.records.record import Record
from rrhf.rewards.reward_models.load import FAILURES, quiet
from rrhf.rewards.reward_models.passes import CausalReward, EncoderReward, Head, RewardModel
from rrhf.rewards.reward_models.reading import CausalReader, PairReader
from rrhf.training.callbacks import LogAtSaves, Seal, ShowProgress, StopOnSignal, Stopped, mean_loss
from rrhf.training.folder import FREE, SETTINGS, begun, claimed, complete, last_checkpoint, naming_full_disk
from rrhf.training.reward_model.config import RewardModelConfig
from rrhf.training.reward_model.data import RankedRecords
from rrhf.training.reward_model.trainer import RewardTrainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("rrhf")

MEASURES, CALIBRATION = "reward-model.json", "calibration.svg"


@dataclass(frozen=True)
class Job:
    """What is asked for."""

    folder: Path
    data: Path
    eval_data: Path | None
    model: ModelSettings
    config: RewardModelConfig


def train_reward_model(
    data: Path,
    model: ModelSettings,
    config: RewardModelConfig,
    *,
    eval_data: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a reward model on the scored records of ``data`` and write it to ``config.output_dir``.

    A folder that holds checkpoints of the same settings is continued. With ``eval_data`` the model is measured on it at
    the end: accuracy on pairs, Kendall's τ on lists and calibration, in ``reward-model.json`` and ``calibration.svg``.

    Returns:
        What stands in ``reward-model.json``.

    Raises:
        UserError: the folder is complete already or holds a training with other settings, or the data has no pair.
        Stopped: a signal came; everything up to the last step is kept.
    """
    job = Job(Path(str(config.output_dir)), data, eval_data, model, config)
    with claimed(job.folder, config):
        with config.main_process_first(local=False):
            begun(job.folder, config, overwrite, lambda: _remember_settings(job))
        trainer = _build(job)
        loss = _run(job, trainer)
        return _save(job, trainer, loss)


def _build(job: Job) -> RewardTrainer:
    config = job.config
    device = config.place(job.model.device)
    location = locate(job.model.model)
    if location.adapter is not None:
        raise UserError(f"--model {job.model.model}: is an adapter alone; name its base model {location.base}")
    if job.model.attn_implementation == FLEX:
        raise UserError(f"--attn_implementation {FLEX}: reward models are not trained with it: leave it out")
    set_seed(config.seed)  # the head begins with random weights
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.source)
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(
                location.source,
                num_labels=1,
                dtype=resolve_dtype(job.model.dtype, device, training=True),
                use_safetensors=True,
                **attention_options(job.model, device),
            )
    except FAILURES as error:
        hint = no_folder(job.model.model)
        raise UserError(f"--model {job.model.model}: no reward model can be made of it: {error}{hint}") from error
    reward = trainable(model.to(device), tokenizer, config.max_length)
    train = RankedRecords(_records(job.data), reward, config.ties)
    if not len(train):
        raise UserError(f"{job.data}: no pair is left to train on: {train.summary()}")
    log.info(f"reward-model: train on {train.summary()}")
    held_out = None
    if job.eval_data is not None:
        held_out = RankedRecords(_records(job.eval_data), reward)
        if not len(held_out):
            raise UserError(f"{job.eval_data}: no pair is there to measure on: {held_out.summary()}")
        log.info(f"reward-model: measure on {held_out.summary()}")
    trainer = RewardTrainer(model, reward, config, train, held_out, tokenizer)
    for replaced in (ProgressCallback, PrinterCallback):  # by ShowProgress
        trainer.remove_callback(replaced)
    trainer.add_callback(ShowProgress)
    return trainer


def _records(file: Path) -> Iterator[Record]:
    return read_records(file, require="scores", empty_responses="drop")


def trainable(model: Any, tokenizer: Any, max_length: int) -> RewardModel:
    """A sequence classification model with one label as rows go through it in training, and in scoring afterwards.

    A causal model's score is read at the last token that is not padding, as transformers reads it; where its tokenizer
    pads with the end token, another special token takes the padding's place, so that the end token is read.
    """
    limits = [max_length, context_length(model), getattr(tokenizer, "model_max_length", None)]
    limit = min(n for n in limits if n)
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not hasattr(model, "score"):
        return EncoderReward(model, PairReader(tokenizer, limit))
    padding = _padding(tokenizer)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = padding
    if tokenizer.pad_token_id != padding:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    reader = CausalReader(tokenizer, limit, unread=padding, together=True)
    backbone = getattr(model, model.base_model_prefix)
    return CausalReward(backbone, Head(model.score.weight), reader, longest_row=2 * limit)


def _padding(tokenizer: Any) -> int:
    """A special token that ends and begins nothing; the end token where there is no other."""
    special = sorted(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, *special]
    taken = (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    found = next((number for number in candidates if number not in taken), tokenizer.eos_token_id)
    if found is None:
        raise UserError("the model's tokenizer has no special token at all: set tokenizer.eos_token and save it")
    return int(found)


def _run(job: Job, trainer: RewardTrainer) -> float:
    """Train, from the last checkpoint if there is one; returns the mean loss."""
    stop = StopOnSignal()
    trainer.add_callback(stop)
    trainer.add_callback(LogAtSaves())
    trainer.add_callback(Seal())
    checkpoint = last_checkpoint(job.folder, check=True)
    if checkpoint is not None:
        log.info(f"reward-model: going on from {checkpoint}")
    with stop.listening(), naming_full_disk(job.folder):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if stop.agreed is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(128 + stop.agreed)
    return mean_loss(trainer.state.log_history, float(result.training_loss))


def _save(job: Job, trainer: RewardTrainer, loss: float) -> dict[str, Any]:
    """Write weights and measures, then the summary, which makes the folder complete."""
    folder, reward = job.folder, trainer.reward
    with naming_full_disk(folder):
        trainer.save_model(str(folder))
    train: RankedRecords = trainer.train_dataset
    measures: dict[str, Any] = {
        "queries": len(train),
        "pairs": train.pairs,
        "skipped": dict(train.skipped),
        "rows_cut": train.cut,
        "steps": trainer.state.global_step,
        "train_loss": loss,
        "path": reward.path if isinstance(reward, CausalReward) else "whole rows",
        "held_out": None,
    }
    if trainer.eval_dataset is not None:
        held_out = ranking_report(trainer.ranked(trainer.eval_dataset), seed=job.config.seed)
        measures["held_out"] = {**held_out, "rows_cut": trainer.eval_dataset.cut}
    if trainer.is_world_process_zero():
        if measures["held_out"] is not None:
            log.info(f"reward-model: {sentence(measures['held_out'])}")
            write_text(folder / CALIBRATION, calibration_plot(measures["held_out"]["calibration"]))
        trainer.save_state()
        write_text(folder / MEASURES, json.dumps(measures, indent=1) + "\n")
        complete(folder, {"settings": _settings(job), **measures})
        if job.config.save_total_limit is None:
            for old in folder.glob("checkpoint-*"):
                shutil.rmtree(old)
    return measures


def sentence(held_out: dict[str, Any]) -> str:
    """What was measured, in one line."""
    accuracy, tau = held_out["accuracy"], held_out["kendall_tau"]
    text = (
        f"held-out pairs: {100 * accuracy['mean']:.1f} % right [{100 * accuracy['low']:.1f}, "
        f"{100 * accuracy['high']:.1f}], {held_out['pairs']} of {held_out['queries']} queries"
    )
    if tau is not None:
        text += f"; Kendall's τ {tau['mean']:.3f} [{tau['low']:.3f}, {tau['high']:.3f}] on {tau['n']} lists"
    return f"{text}; calibration error {held_out['calibration_error']:.3f}"


def calibration_plot(bins: list[dict[str, float]]) -> str:
    """A picture (SVG) of how often the preferred response is the better one, by how sure the model says it is."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.6, linestyle=":")
        axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], marker="o", color="#3366cc")
        axes.set_xlabel("σ(difference of the rewards)")
        axes.set_ylabel("share of pairs ordered rightly")

    svg = inline_svg(draw, (4.0, 3.2), "calibration on held-out pairs")
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _settings(job: Job) -> dict[str, Any]:
    """What makes this training another one when it changes: settings, and the content of data and weights."""

    def checksum(file: Path | None) -> str | None:
        return checksum_of_file(file) if file is not None and file.is_file() else None  # reading it says what is wrong

    everything = {
        **json.loads(job.config.to_json_string()),
        "data": checksum(job.data),
        "eval_data": checksum(job.eval_data),
        "model": model_digest(job.model.model) or job.model.model,
        "dtype": job.model.dtype,
        "attn_implementation": job.model.attn_implementation,
        "max_tokens_per_forward": job.config.max_tokens_per_forward,
        "processes": job.config.world_size,
    }
    if job.config.bf16_by_default:
        del everything["bf16"]
    return {name: value for name, value in sorted(everything.items()) if name not in _free() and value is not None}


def _free() -> set[str]:
    """What a resumed training may change; the budget of a forward pass is the batching of the loss here."""
    return FREE - {"max_tokens_per_forward"}


def _remember_settings(job: Job) -> None:
    """Write down what this training is; refuse to go on with one that was another."""
    place, settings = job.folder / SETTINGS, _settings(job)
    if place.exists():
        before = read_object(place)
        free = _free() | ({"processes"} - before.keys())  # older versions did not write it down
        refuse_other_settings(
            {name: value for name, value in before.items() if name not in free},
            {name: value for name, value in settings.items() if name not in free},
            f"{job.folder} holds a training run with other settings",
            "run with those to go on, or give --overwrite to train anew",
            of={"data": job.data, "eval_data": job.eval_data, "model": job.model.model},
        )
    else:
        write_text(place, json.dumps(settings, indent=1) + "\n")
