"""The folder of a trained model: whether it is complete, its checkpoints, who works in it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rrhf.common.errors import UserError

if TYPE_CHECKING:
    from rrhf.training.config import RRHFConfig

log = logging.getLogger("rrhf")


TRAINED = "training.json"  # written last: a model folder that has it is complete


def is_trained(folder: Path) -> bool:
    """Whether a training run in ``folder`` came to its end."""
    return (folder / TRAINED).exists()


SETTINGS = "training-settings.json"


# What a resumed run may change without becoming another run.
FREE = {"output_dir", "logging_steps", "save_steps", "save_total_limit", "disable_tqdm", "report_to", "run_name",
        "logging_dir", "eval_steps", "eval_strategy", "max_tokens_per_forward",
        "keep_logits"}  # fmt: skip


BUDGET = "max_tokens_per_forward"  # stands in the settings, chosen or given, and is not compared
# Compared only where both runs know them: older versions did not write them down.
INPUTS = {"data_checksum", "eval_data", "eval_data_checksum", "model_digest"}
NAMED = {  # name → its content
    "data": "data_checksum", "eval_data": "eval_data_checksum", "model": "model_digest",
    "reference_model": "reference_sums",
}  # fmt: skip


@contextmanager
def claimed(folder: Path, config: RRHFConfig, overwrite: bool) -> Iterator[None]:
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
def naming_full_disk(folder: Path) -> Iterator[None]:
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

    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    checkpoints.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
    return next((str(path) for path in checkpoints if whole(path)), None)
