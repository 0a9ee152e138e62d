"""Whole files or none: every result is written beside its place and renamed into it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rrhf.errors import UserError


def fsync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success fsync it and rename it to ``path``.

    On any exception the temporary file is removed and what stood at ``path`` stays whole.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (temporary, path, path.parent):
            raise
        raise UserError(
            f"{path}: cannot write: {error.strerror or error}. What stood there before is untouched; "
            "free some space or choose another --output, then run the same command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise ``UserError`` where ``path`` exists and may not be replaced."""
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} exists already: give --overwrite to replace it, or another --output")
