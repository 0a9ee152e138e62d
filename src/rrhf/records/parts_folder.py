"""The folder of unfinished work beside an output: its parts, what is known of each, and who is at work on them.

``OUTPUT.parts/`` holds one file a part and step, and a manifest a process that names the parts it wrote with their
checksums. A part counts only when a manifest names it, its checksum fits and it was made of the same input, so a
process may die at any moment.

A process that works on a part holds a lock on it, which the system drops where the process dies. All processes at work
share a lock on the folder; who begins it, or joins its parts into the output, holds that lock alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from rrhf.common.errors import UserError
from rrhf.common.files import (
    append_line,
    claimed_place,
    elsewhere,
    fsync_folder,
    refuse_existing,
    replacing,
    write_text,
)
from rrhf.common.launch import rank_and_world
from rrhf.common.locks import hold
from rrhf.common.settings import refuse_other_settings
from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import join_records, read_records, write_records
from rrhf.records.record import Record, record_line

log = logging.getLogger("rrhf")

_BOOT = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)  # of the machine, by the clock as it is now

Work = Callable[[list[Record], Callable[[int], None]], Iterable[Record]]
Finish = Callable[[Callable[[], Iterator[Record]]], Iterable[Record]]  # streams all results → what is written


def nothing_left(output: Path, overwrite: bool) -> bool:
    """Whether other processes of this launch have written ``output`` already, or the first of them refuses for all.

    Raises:
        UserError: the output exists and may not be replaced.
    """
    rank, world = rank_and_world()
    if (_folder(output) / "settings.json").exists() or not output.exists():
        return False
    if world > 1 and (output.stat().st_mtime > _process_start() or (rank and not overwrite)):
        return True
    shutil.rmtree(_removed(output), ignore_errors=True)  # a process may have died while removing it
    refuse_existing(output, overwrite)
    return False


@dataclass(frozen=True)
class _Entry:
    """What a manifest says of a part: the checksums of its file and of its input, and what its work counted."""

    sha256: str
    input: str
    counts: dict[str, int]


class PartsFolder:
    """The folder of parts of one output, as one process sees it.

    Args:
        output: the record file that the parts are joined into.
        steps: how many steps a part goes through.
        counts: what the work counts; holds the sum over all parts once they are joined.
    """

    def __init__(self, output: Path, steps: int, counts: Counter[str]) -> None:
        self.output, self.steps, self.counts = output, steps, counts
        self.folder = _folder(output)
        self.settings = self.folder / "settings.json"
        self.manifest = self.folder / f"manifest-{rank_and_world()[0]:05d}.jsonl"
        self.entries: dict[tuple[int, int], _Entry] = {}  # (step, part) → its last entry
        self.read: dict[Path, int] = {}  # manifest → bytes of it that are known
        self.made_here = False  # whether the last part asked for was made now
        self.lock: IO[str] | None = None
        self.claims: IO[bytes] | None = None
        self.worker: IO[str] | None = None

    # -- opening and closing

    def open(self, wanted: dict[str, Any], overwrite: bool) -> bool:
        """Begin the folder or go on in it, with the settings ``wanted``; false where nothing is left to do.

        Raises:
            UserError: the output exists, the folder cannot be made, or holds parts made with other settings.
        """
        tries = 10
        while not nothing_left(self.output, overwrite):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = (self.folder / "lock").open("a+", encoding="utf-8")
            except OSError as error:
                tries -= 1
                gone = isinstance(error, FileNotFoundError | FileExistsError)  # by another process in between, or never
                if tries and gone and (self.folder.is_dir() or not os.path.lexists(self.folder)):
                    continue
                reason = f"{error.strerror} ({error.filename})"
                raise UserError(f"{self.folder}: cannot be made: {reason}; {elsewhere(error)}") from error
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                fcntl.flock(self.lock, fcntl.LOCK_SH)  # waits for one that opens, or joins
                alone = False
            if not self._was_removed():
                if alone and not self._begin(wanted, overwrite):
                    return False
                fcntl.flock(self.lock, fcntl.LOCK_SH)
                if (begun := self._begun()) is not None:
                    self._refuse_other(begun["settings"], wanted)
                    self.worker = self._hold_rank()
                    self.claims = (self.folder / "claims").open("ab")
                    return True
            self.close()
        return False

    def _hold_rank(self) -> IO[str]:
        """Refuse to be the second process with this rank: it belongs to no launch that the first belongs to."""
        refusal = (
            f"{self.output} is being written by another process: {{who}}. Wait for it or choose another --output; to "
            "share the work start them together (docs/distributed.md)"
        )
        return hold(self.folder / f"worker-{rank_and_world()[0]:05d}", refusal)

    def close(self) -> None:
        """Let go of the folder; it may be opened again."""
        for file in (self.lock, self.claims, self.worker):
            if file is not None:
                file.close()
        self.lock = self.claims = self.worker = None

    def _begun(self) -> Any:
        """What the parts here were begun with, ``None`` where there are none."""
        try:
            begun = json.loads(self.settings.read_text(encoding="utf-8"))
            if not isinstance(begun, dict) or not isinstance(begun.get("settings"), dict) or "replaces" not in begun:
                raise ValueError("it lacks what parts begin with")
            return begun
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.settings}: damaged ({error}): remove {self.folder} to begin anew") from error

    def _was_removed(self) -> bool:
        """Whether the folder was removed after its lock was opened."""
        assert self.lock is not None
        try:
            return (self.folder / "lock").stat().st_ino != os.fstat(self.lock.fileno()).st_ino
        except FileNotFoundError:
            return True

    def _begin(self, wanted: dict[str, Any], overwrite: bool) -> bool:
        """Where no other process works here: keep the parts that can be used, or remove them and note the settings.

        Returns:
            False where nothing is left to do.
        """
        assert self.lock is not None
        self.lock.truncate(0)
        begun, replaced = self._begun(), _identity(self.output)
        if begun is None and nothing_left(self.output, overwrite):  # it was joined while this process opened it
            self._remove()
            return False
        if begun is not None and replaced and begun["replaces"] != replaced and not overwrite:
            self._remove()  # a process was stopped between joining the parts and removing them
            return False
        refuse_existing(self.output, overwrite)
        begins = {"settings": wanted, "replaces": replaced}
        if begun is None or (overwrite and begun != begins):
            # The settings go first: without them, what a dying process leaves here does not count.
            for path in [self.settings, *self.folder.iterdir()]:
                if path.name != "lock":
                    path.unlink(missing_ok=True)
            begun = None
        self._read_manifests(everyone=True)
        # The settings may change where no part is done; but answers that were paid for are not thrown away.
        if begun is None or not (self.entries or any(self.folder.glob("journal-*"))):
            write_text(self.settings, json.dumps(begins, indent=1))
        return True

    def _refuse_other(self, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
        cure = "run with those to finish it; to begin anew give --overwrite or, in a run, remove that folder"
        refuse_other_settings(begun, wanted, f"{self.folder} holds unfinished work with other settings", cure)
        self._read_manifests(everyone=True)

    def _remove(self) -> None:
        """Remove the folder; renamed first, so that no process sees it with some of its parts gone."""
        removed = _removed(self.output)
        shutil.rmtree(removed, ignore_errors=True)
        self.folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    # -- parts

    def part(self, step: int, number: int) -> Path:
        """The file of a part after a step; those of the last step are what is joined."""
        name = "part" if step == self.steps - 1 else f"step-{step}-part"
        return self.folder / f"{name}-{number:07d}.jsonl"

    def records(self, step: int, number: int) -> list[Record]:
        path = self.part(step, number)
        return list(read_records(path)) if path.stat().st_size else []

    def make(
        self,
        step: int,
        number: int,
        origin: str,
        read: Callable[[], list[Record]],
        work: Work,
        done: Callable[[int], None],
    ) -> str | None:
        """Make a part, unless it was made already.

        Args:
            step, number: which part.
            origin: the checksum of the records it is made of.
            read: reads those records.
            work: makes the part of them.
            done: called with the number of records done.

        Returns:
            The part's checksum; None where another process is making it.
        """
        self.made_here = False
        checksum = self._checksum(step, number, origin)
        if checksum is None:
            assert self.claims is not None
            with claimed_place(self.claims, number * self.steps + step) as mine:
                if not mine:
                    return None
                self._read_manifests()
                checksum = self._checksum(step, number, origin)
                if checksum is None:
                    self.counts.clear()
                    checksum = self._write(step, number, origin, work(read(), done))
                    self.made_here = True
        return checksum

    def made(self, step: int, number: int, origin: str) -> str | None:
        """The checksum of a part, where it was made of the input whose checksum is ``origin``."""
        return self._checksum(step, number, origin)

    def keep(self, step: int, number: int, origin: str, records: Iterable[Record], counts: Counter[str]) -> str:
        """Keep a part that was made elsewhere, and what was counted there; returns its checksum."""
        self.counts.clear()
        self.counts.update(counts)
        return self._write(step, number, origin, records)

    def _checksum(self, step: int, number: int, origin: str) -> str | None:
        """The checksum of a part that is whole and was made of the input whose checksum is ``origin``; else None."""
        entry, path = self.entries.get((step, number)), self.part(step, number)
        if entry is None or entry.input != origin:
            return None
        if not path.exists() or checksum_of_file(path) != entry.sha256:
            log.warning(f"{path} is gone or damaged, it is not what was written: it is made again")
            return None
        return entry.sha256

    def _read_manifests(self, everyone: bool = False) -> None:
        """Read what was added since the last time by the processes known, or all that ``everyone`` ever wrote."""
        if everyone:
            world = range(rank_and_world()[1])
            names = {self.manifest, *(self.folder / f"manifest-{rank:05d}.jsonl" for rank in world)}
            self.read = dict.fromkeys(sorted(names | set(self.folder.glob("manifest-*.jsonl"))), 0)
            self.entries.clear()
        for manifest, known in self.read.items():
            with contextlib.suppress(FileNotFoundError), manifest.open("rb") as file:
                file.seek(known)
                for line in file:
                    if not line.endswith(b"\n"):  # being written, or left so by a dying process
                        break
                    self.read[manifest] += len(line)
                    # A torn line that another process has closed, or one that the disk changed: its part is made again.
                    with contextlib.suppress(ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
                        entry = json.loads(line)
                        place = int(entry["step"]), int(entry["part"])
                        counts = {str(name): int(count) for name, count in dict(entry["counts"]).items()}
                        self.entries[place] = _Entry(str(entry["sha256"]), str(entry["input"]), counts)

    def _write(self, step: int, number: int, origin: str, records: Iterable[Record]) -> str:
        """Write one part whole, then enter it in this process's manifest."""
        path = self.part(step, number)
        with replacing(path, tidy=False) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(record_line(record) + "\n")
        entry = _Entry(checksum_of_file(path), origin, dict(self.counts))
        is_new = not self.manifest.exists()
        append_line(self.manifest, json.dumps({"step": step, "part": number, **vars(entry)}), sync=True)
        if is_new:
            fsync_folder(self.folder)
        self.entries[step, number] = entry
        return entry.sha256

    # -- the end

    def join(self, origins: Sequence[str], finish: Finish | None = None) -> bool:
        """Join the parts into the output, unless another process has; false where parts are left to do after all.

        Args:
            origins: the checksums of the input's parts, in order.
            finish: see ``in_parts``.
        """
        assert self.lock is not None
        fcntl.flock(self.lock, fcntl.LOCK_EX)  # waits until no other process works here
        if self._was_removed():
            if not self.output.exists():
                raise UserError(f"{self.folder} was removed while work went on in it: run the same command again")
            self.lock.seek(0)
            self._total(json.loads(self.lock.read() or "[]"))
            return True
        self._read_manifests()
        whole: list[str | None] = list(origins)
        for step in range(self.steps):
            whole = [origin and self._checksum(step, number, origin) for number, origin in enumerate(whole)]
        if missing := whole.count(None):
            log.info(f"{missing} parts were not finished by the process that began them: they are done here")
            fcntl.flock(self.lock, fcntl.LOCK_SH)
            return False
        if finish is None:
            last = (self.part(self.steps - 1, number) for number in range(len(origins)))
            join_records(self.output, last, overwrite=True)
        else:
            write_records(self.output, finish(partial(self._records, len(origins))), overwrite=True)
        counted = [self.entries[step, number].counts for step in range(self.steps) for number in range(len(origins))]
        self._total(counted)
        self.lock.write(json.dumps([self.counts]))  # for those who wait with the file open
        self.lock.flush()
        self._remove()
        return True

    def _total(self, counted: Iterable[Mapping[str, int]]) -> None:
        self.counts.clear()
        for counts in counted:
            self.counts.update(counts)

    def _records(self, count: int) -> Iterator[Record]:
        for number in range(count):
            yield from self.records(self.steps - 1, number)


def _folder(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def _removed(output: Path) -> Path:
    return output.with_name(f".{output.name}.parts.removed")


def _identity(path: Path) -> list[int] | None:
    """What tells a file from another that replaced it."""
    try:
        state = path.stat()
    except OSError:
        return None
    return [state.st_ino, state.st_size, state.st_mtime_ns]


def _process_start() -> float:
    """When this process began, in seconds since the epoch: processes that were launched together began together.

    By the clock as it was early in the process: one that is put forward later makes no output an older one.
    """
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])
    return _BOOT + ticks / os.sysconf("SC_CLK_TCK")
