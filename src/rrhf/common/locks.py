"""One process at a time: who comes second is told who the first is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rrhf.common.errors import UserError
from rrhf.common.files import elsewhere

log = logging.getLogger("rrhf")

LOCK = ".lock"  # in a folder in which one process works


def hold(path: Path, refusal: str) -> IO[str]:
    """Lock the file ``path``, which is made, until it is closed; it says who this process is.

    The system drops the lock where the process dies, so that a file which was left behind stops nobody.

    Raises:
        UserError: another process holds it; ``refusal`` with its id and its machine.
        OSError: the file cannot be made.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = _holder(file)
            file.close()
            raise UserError(refusal.replace("{who}", who)) from error
        except OSError:
            log.warning(f"{path.parent}: this file system has no locks: see that nothing else works there")
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # removed by the one that held it, after it was opened here
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
    file.flush()
    return file


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        found = json.loads(file.read())
        return f"process {int(found['pid'])} on {found['host']}"
    except (ValueError, LookupError, TypeError, ArithmeticError):  # it has the lock and has not said so yet
        return "another process"


def wait_until_free(folder: Path, seconds: float) -> None:
    """Wait, no longer than that, until no process works in ``folder``: the last one may be dying."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            hold(folder / LOCK, "{who}").close()
        except UserError:
            time.sleep(0.2)
        else:
            return


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make ``folder`` and say where it, or what is opened in it now, cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; {elsewhere(error)}") from error


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process, or thread, is in ``folder``, which is made; the others wait for this one.

    Raises:
        UserError: the folder cannot be made or written.
    """
    with _made(folder):
        file = (folder / LOCK).open("a+", encoding="utf-8")
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process, or thread, writes in ``folder``, which is made and in which no lock file is left.

    For what reads a file, adds to it and replaces it.

    Raises:
        UserError: the folder cannot be made or read.
    """
    with _made(folder):
        place = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks on folders
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


@contextlib.contextmanager
def only_process(folder: Path, refusal: str) -> Iterator[None]:
    """Keep other processes out of ``folder``, which is made, for as long as this lasts.

    Raises:
        UserError: another is there; ``refusal``, whose ``{who}`` is its id and machine.
    """
    with _made(folder):
        file = hold(folder / LOCK, refusal)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            (folder / LOCK).unlink()
        file.close()
