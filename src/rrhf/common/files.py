"""Whole files or none: every result is written beside its place and renamed into it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rrhf.common.errors import UserError

WRITING_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # and name no file


def cache_folder() -> Path:
    """Where converted models, fitted classifiers and copies of URLs are kept: ``$RRHF_CACHE`` or ``~/.cache/rrhf``."""
    return Path(os.environ.get("RRHF_CACHE") or Path.home() / ".cache" / "rrhf")


def fsync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: str | Path, tidy: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success fsync it and rename it to ``path``.

    On any exception the temporary file is removed and what stood at ``path`` stays whole. What a killed process left
    behind is removed when ``path`` is written again, unless ``tidy`` is false (it looks through the whole folder).

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = _temporary(path, os.getpid())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if tidy:
            _remove_stale(path)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        named = error.filename is not None
        ours = Path(error.filename) in (temporary, path, *path.parents) if named else error.errno in WRITING_FAILED
        if not ours:  # of what is read on the way: another file, a connection
            raise
        raise UserError(
            f"{path}: cannot write: {error.strerror or error}. What stood there before is untouched; "
            "free some space or choose another --output, then run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # there is none after a success, nor where no folder could be made
            temporary.unlink()


def _temporary(path: Path, process: int | str) -> Path:
    return path.with_name(f".{path.name}.{os.uname().nodename}-{process}.tmp")


def _remove_stale(path: Path) -> None:
    """Remove temporary files of ``path`` whose process, on this machine, is gone."""
    start, _, end = _temporary(path, "|").name.partition("|")
    for other in list(path.parent.iterdir()):
        number = other.name.removeprefix(start).removesuffix(end)
        if other.name == f"{start}{number}{end}" and number.isdigit():
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                other.unlink(missing_ok=True)
            except OSError:  # someone else's process
                pass


def elsewhere(error: OSError) -> str:
    """What to do where an output's folder cannot be written."""
    return ("free some space or " if error.errno in WRITING_FAILED else "") + "choose another --output"


def checksum_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: str | Path, line: str, sync: bool = False) -> None:
    """Append a line; one that a dying process left unfinished before it is closed first."""
    with Path(path).open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise ``UserError`` where ``path`` exists and may not be replaced."""
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} exists already: give --overwrite to replace it, or another --output")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is no such file.

    Raises:
        UserError: the file is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): write or fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return found


def json_lines(path: str | Path) -> list[Any]:
    """What the lines of a file hold, one JSON value each; empty lines are passed over.

    Only a line feed ends a line: ``str.splitlines`` also cuts at U+2028, U+0085 and others, which JSON leaves as they
    are within a text.

    Raises:
        ValueError: a line is no JSON.
    """
    with Path(path).open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file if line.strip()]


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of ``folder``, where a file says so that somebody else may have written.

    Raises:
        UserError: the name leads out of the folder.
    """
    try:
        place = (folder / name).resolve()
        held = name != "" and place != folder.resolve() and place.is_relative_to(folder.resolve())
    except (OSError, ValueError):  # a character that no name has
        held = False
    if not held:
        raise UserError(f"{folder}: a file in it names {name!r}, which leads out of that folder: it is not read")
    return folder / name


@contextlib.contextmanager
def claimed_place(file: IO[bytes], place: int, wait: bool = False) -> Iterator[bool]:
    """Hold ``place``, if no other process does: the system's lock on one byte of ``file``, which a dying process drops.

    Args:
        file: open for writing; processes that share out work open the same one. It need not have that byte.
        place: of the byte.
        wait: wait for it, instead of yielding False at once where another process has it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
    except (BlockingIOError, PermissionError):
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, place)
