"""The folder of a trained model: whether it is complete, its checkpoints, who works in it."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rrhf.common.errors import UserError
from rrhf.common.files import read_object, write_text
from rrhf.common.locks import LOCK, only_process
from rrhf.common.settings import OtherSettingsError
from rrhf.records.checksums import checksum_of_file

log = logging.getLogger("rrhf")

T = TypeVar("T")


TRAINED = "training.json"  # written last: a model folder that has it is complete


def is_trained(folder: Path) -> bool:
    """Whether a training run in ``folder`` came to its end."""
    return (folder / TRAINED).exists()


def complete(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary``, which makes the folder complete, once all that stands beside it has come to the disk.

    Else the weights could be lost in a power cut that the summary outlives, and the checkpoints are gone by then.
    """
    with naming_full_disk(folder):
        for path in folder.iterdir():
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
    write_text(folder / TRAINED, json.dumps(summary, indent=2) + "\n")  # and the folder itself


def refuse_trained(folder: Path) -> None:
    """Refuse to train into a folder that holds a finished model; raises ``UserError``."""
    if is_trained(folder):
        raise UserError(f"{folder} holds a finished model: give --overwrite to train anew, or another --output")


SETTINGS = "training-settings.json"
CHECKSUMS = "checksums.json"  # of a checkpoint's other files
OPTIMISERS = ("*optimizer*", "global_step*")  # in a checkpoint: one file, FSDP's pieces, DeepSpeed's folder
SCRATCH = ".cluster-"  # how a folder begins in which the processes of a training on a cluster meet


# What a resumed run may change without becoming another run.
FREE = {"output_dir", "logging_steps", "save_steps", "save_total_limit", "disable_tqdm", "report_to", "run_name",
        "logging_dir", "eval_steps", "eval_strategy", "max_tokens_per_forward",
        "keep_logits", "hub_token", "hub_strategy", "hub_always_push"}  # fmt: skip


BUDGET = "max_tokens_per_forward"  # stands in the settings, chosen or given, and is not compared
# Compared only where both runs know them: older versions did not write them down.
INPUTS = {"data_checksum", "eval_data", "eval_data_checksum", "model_digest", "processes"}
NAMED = {  # name → its content
    "data": "data_checksum", "eval_data": "eval_data_checksum", "model": "model_digest",
    "reference_model": "reference_sums",
}  # fmt: skip


class Process(Protocol):
    """Which of the connected processes this is; ``RRHFConfig`` knows it."""

    @property
    def process_index(self) -> int: ...


MADE = ("checkpoint-*", "*.safetensors", "windows", "watch")  # what the first steps of a training leave


@contextmanager
def claimed(folder: Path, config: Process) -> Iterator[None]:
    """Keep other trainings out of ``folder`` while this one works there.

    Processes that are not connected with this one, whatever started them, are met here too.
    """
    if config.process_index != 0:
        yield
        return
    refusal = (
        f"{folder}: another process trains into this folder: {{who}}. Wait for it, choose another --output, or, if "
        "they were to train together, start them with torchrun (docs/distributed.md)"
    )
    with only_process(folder, refusal):
        yield


def begun(folder: Path, config: Process, overwrite: bool, remember: Callable[[], T]) -> T:
    """What ``remember`` returns: it writes down what this training is, or refuses to go on with one that was another.

    With ``overwrite`` a training of the same settings that was stopped is gone on with: the command that began it had
    ``overwrite`` too. What else stands in ``folder`` is removed. A training that ended before its first step left
    nothing but its settings: others take their place, so that the command which mends it goes on.

    Raises:
        UserError: the folder holds a finished model, or what no training wrote, or as ``remember``.
    """
    if overwrite and config.process_index == 0:
        if _is_unfinished(folder):
            with suppress(OtherSettingsError):
                return remember()
        empty(folder)
    refuse_trained(folder)
    try:
        return remember()
    except OtherSettingsError:
        if config.process_index != 0 or any(any(folder.glob(made)) for made in MADE):
            raise
        (folder / SETTINGS).unlink()
        return remember()


def _is_unfinished(folder: Path) -> bool:
    try:
        return bool(read_object(folder / SETTINGS)) and not is_trained(folder)
    except UserError:  # it cannot be read: nobody can go on with it
        return False


def empty(folder: Path) -> None:
    """Remove what a training wrote; stopped anywhere, it leaves no half checkpoint, and what says whose it was.

    Raises:
        UserError: no training wrote what is there.
    """
    _refuse_to_empty(folder)
    for old in folder.glob(".removed-*"):
        shutil.rmtree(old)
    for old in folder.glob("checkpoint-*"):
        old.rename(old.with_name(f".removed-{old.name}"))
    last = (TRAINED, SETTINGS)
    for old in sorted(folder.iterdir(), key=lambda path: last.index(path.name) + 1 if path.name in last else 0):
        if old.name == LOCK or old.name.startswith(SCRATCH):
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()


def _refuse_to_empty(folder: Path) -> None:
    """A folder is emptied where a training made it, or begins in it; another one may be anything, somebody's home."""
    passing = (LOCK, SCRATCH, f".{SETTINGS}")  # what stands there before a training has its settings written
    found = {path.name for path in folder.iterdir() if not path.name.startswith(passing)}
    if found and not found & {SETTINGS, TRAINED}:
        raise UserError(
            f"{folder}: --overwrite would remove what is in it ({', '.join(sorted(found)[:3])}, …), and no training "
            "wrote that: give another --output, or empty the folder yourself"
        )


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Turn what a full disk makes safetensors and torch raise, each in its own type, into a message."""
    try:
        yield
    except Exception as error:
        if not folder.exists() or (isinstance(error, FileNotFoundError) and str(folder) in str(error.filename)):
            raise UserError(
                f"{folder}: it, or a folder in it, was removed while training wrote there ({error}). The same command "
                "trains again from what is left"
            ) from error
        signs = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
        if not any(sign in str(error) for sign in [*signs, "PytorchStreamWriter failed writing"]):
            raise
        raise UserError(
            f"{folder}: the weights cannot be written: {error}. Earlier checkpoints are untouched: free some space, "
            "then run the same command again"
        ) from error


def seal(checkpoint: Path) -> None:
    """Write down the checksum of every file of a checkpoint that is whole."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    found = {str(path.relative_to(checkpoint)): checksum_of_file(path) for path in files}
    write_text(checkpoint / CHECKSUMS, json.dumps(found, indent=1) + "\n")


def _is_sound(checkpoint: Path) -> bool:
    """Whether every file is what was written; a process may have died before it wrote the checksums down."""
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        for name, sum in sums.items():
            if checksum_of_file(checkpoint / name) != sum:
                log.warning(f"{checkpoint} is damaged: {name} is not what was written; the one before it is taken")
                return False
    except FileNotFoundError as error:
        if Path(str(error.filename)).name != CHECKSUMS:
            log.warning(f"{checkpoint} is damaged: {error.filename} is gone; the one before it is taken")
            return False
    except (ValueError, AttributeError, OSError, RecursionError):
        log.warning(f"{checkpoint} is damaged: {CHECKSUMS} cannot be read; the one before it is taken")
        return False
    return True


def last_checkpoint(folder: Path, check: bool = False) -> str | None:
    """The last checkpoint that was written whole: its ``trainer_state.json``, which comes last, stands and parses.

    One without an optimiser's state is passed over: training would begin it, and the schedule, anew. With ``check``
    every file must have the checksum that was written down (``seal``) too; what is passed over for either is said.
    """

    def whole(checkpoint: Path) -> bool:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        if check and not _is_sound(checkpoint):
            return False
        has_optimiser = any(any(checkpoint.glob(name)) for name in OPTIMISERS)
        if check and not has_optimiser:
            log.warning(f"{checkpoint} lacks the optimiser's state (--save_only_model): the one before it is taken")
        return has_optimiser

    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    checkpoints.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
    return next((str(path) for path in checkpoints if whole(path)), None)
