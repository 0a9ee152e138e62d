"""How ``micro`` trains its own models: on CPUs, with transformers' Trainer, going on where it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.files import write_text
from rrhf.models.folders import save_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORK = "training"  # where checkpoints stand, in the model's folder, until it is complete


def train_in(
    folder: Path, model: PreTrainedModel, rows: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], **more: Any
) -> PreTrainedModel:
    """Train ``model`` on ``rows``, with checkpoints in ``folder``.

    Args:
        folder: the model's.
        model: to begin with.
        rows: one training example each.
        arguments: of ``TrainingArguments``.
        more: of ``Trainer``.

    Returns:
        The trained model, in evaluation mode.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from rrhf.training.callbacks import Seal, ShowProgress
    from rrhf.training.folder import last_checkpoint

    work = folder / WORK
    settings = TrainingArguments(
        output_dir=str(work), lr_scheduler_type="linear", save_total_limit=2, logging_steps=50, report_to="none",
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **arguments,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=rows, callbacks=[ShowProgress, Seal], **more)
    for replaced in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(replaced)
    trainer.train(resume_from_checkpoint=last_checkpoint(work, check=True))
    trained: PreTrainedModel = trainer.model.eval()
    return trained


def keep(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, done: str, text: str) -> None:
    """Write a trained model into ``folder`` and, last, the file ``done`` that says so; checkpoints go."""
    save_policy(model, tokenizer, folder)
    write_text(folder / done, text)
    shutil.rmtree(folder / WORK, ignore_errors=True)
