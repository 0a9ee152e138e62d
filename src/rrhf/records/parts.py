"""Long work on records in parts that are written once, whole: what a stopped run has done is never done again.

Beside the output stands ``OUTPUT.parts/`` with one file a part and step, and manifests of their checksums. A part
counts only when a manifest names it, its checksum fits and it was made of the same input, so a process may die at any
moment. When all parts are there they are joined into the output, and the folder goes.

Any number of processes (RANK and WORLD_SIZE, as torchrun sets them) share the parts out: each takes the next one that
nobody has done or is doing, by a lock that the system drops where a process dies, so nobody waits for the dead: those
who are left do their parts. Each holds a shared lock on the folder while it works and an exclusive one to join.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rrhf.common.errors import UserError
from rrhf.common.files import append_line, fsync_folder, refuse_existing, replacing, write_text
from rrhf.common.launch import rank_and_world
from rrhf.common.progress import Progress
from rrhf.common.settings import refuse_other_settings
from rrhf.records.files import WRITERS, file_suffix, read_records, write_records
from rrhf.records.record import Record, record_line

log = logging.getLogger("rrhf")

Work = Callable[[list[Record], Callable[[int], None]], Iterable[Record]]
Input = tuple[str | None, Callable[[], list[Record]]]  # a part's checksum, None where it is not there yet; reads it


def in_parts(
    records: Callable[[], Iterable[Record]],
    output: Path,
    steps: Mapping[str, Work],
    settings: Mapping[str, Any],
    *,
    part_size: int,
    overwrite: bool = False,
    counts: Counter[str] | None = None,
    total: int | None = None,
) -> int:
    """Run ``steps`` over ``records``, a part at a time, and write what the last returns to ``output`` in order.

    Args:
        records: streams the input; it must be the same at every call, and when a stopped run goes on.
        output: a record file (.jsonl, .jsonl.gz or .parquet).
        steps: name (shown with the progress) → work. A work takes a part's records and a callback for progress
            (records done), and returns the part's results in order; the next step gets those. A process takes all
            its parts through one step before it begins the next.
        settings: what the results depend on; parts made with others are refused.
        part_size: records a part.
        overwrite: replace an output that exists, and begin anew; but parts that were begun to replace this very output
            with the same settings are gone on with, so that the same command can be stopped and run again.
        counts: works add to it what they count. In the end it holds the sum over all parts, whoever did them and when.
        total: how many records there are, where known.

    Returns:
        The number of input records; 0 where the work was done before this process began.

    Raises:
        UserError: the output exists or cannot be written, or its unfinished parts were made with other settings.
    """
    file_suffix(output, WRITERS)
    store = _Parts(output, len(steps), Counter() if counts is None else counts)
    try:
        if not store.enter(json.loads(json.dumps(settings)), overwrite):
            return 0
        while True:
            sizes, origins = _work_through(records, steps, store, part_size, total)
            if not sizes:
                raise UserError(f"{output}: there is no record to work on")
            if store.join(origins):
                return sum(sizes)
    finally:
        store.leave()


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
    shutil.rmtree(_removed(output), ignore_errors=True)  # a process may have died while clearing up
    refuse_existing(output, overwrite)
    return False


def checksum_of_records(block: Iterable[Record]) -> str:
    """SHA-256 of all that the records hold."""
    digest = hashlib.sha256()
    for record in block:
        digest.update(record_line(record).encode() + b"\n")
    return digest.hexdigest()


def checksum_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _work_through(
    records: Callable[[], Iterable[Record]],
    steps: Mapping[str, Work],
    store: _Parts,
    part_size: int,
    total: int | None,
) -> tuple[list[int], list[str]]:
    """Do what nobody has done or is doing; the sizes of the input's parts and their checksums."""
    sizes: list[int] = []
    origins: list[str] = []

    def cut() -> Iterator[Input]:
        stream = iter(records())
        while block := list(islice(stream, part_size)):
            sizes.append(len(block))
            origins.append(checksum_of_records(block))  # before work, which may change the records
            yield origins[-1], partial(list, block)

    inputs: Iterable[Input] = cut()
    for step, (description, work) in enumerate(steps.items()):
        made: list[str | None] = []
        with Progress(description, total, "records") as bar:
            for number, (origin, read) in enumerate(inputs):
                made.append(None if origin is None else store.make(step, number, origin, read, work, bar.update))
                if made[-1] is not None and not store.made_here:
                    bar.update(sizes[number])
        inputs = [(checksum, partial(store.records, step, number)) for number, checksum in enumerate(made)]
    return sizes, origins


@dataclass(frozen=True)
class _Entry:
    """What a manifest says of a part: the checksums of its file and of its input, and what its work counted."""

    sha256: str
    input: str
    counts: dict[str, int]


class _Parts:
    """The folder of parts of one output, as one process sees it."""

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

    # -- coming and going

    def enter(self, wanted: dict[str, Any], overwrite: bool) -> bool:
        """Come into the folder, make or clear it first where nobody is in it; false where nothing is left to do."""
        while not nothing_left(self.output, overwrite):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = (self.folder / "lock").open("a+", encoding="utf-8")
            except FileNotFoundError:  # another process cleared up in between
                continue
            except OSError as error:
                raise UserError(f"{self.folder}: cannot be made: {error.strerror}; choose another --output") from error
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                fcntl.flock(self.lock, fcntl.LOCK_SH)  # waits for one that opens, or joins
                alone = False
            if not self._gone():
                if alone and not self._open(wanted, overwrite):
                    return False
                fcntl.flock(self.lock, fcntl.LOCK_SH)
                if (begun := self._begun()) is not None:
                    self._refuse_other(begun["settings"], wanted)
                    self.claims = (self.folder / "claims").open("ab")
                    return True
            self.leave()
        return False

    def leave(self) -> None:
        for file in (self.lock, self.claims):
            if file is not None:
                file.close()
        self.lock = self.claims = None

    def _begun(self) -> Any:
        """What the parts here were begun with, ``None`` where there are none."""
        try:
            return json.loads(self.settings.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _gone(self) -> bool:
        """Whether the folder was cleared up since its lock was opened."""
        assert self.lock is not None
        try:
            return (self.folder / "lock").stat().st_ino != os.fstat(self.lock.fileno()).st_ino
        except FileNotFoundError:
            return True

    def _open(self, wanted: dict[str, Any], overwrite: bool) -> bool:
        """Nobody else is here: take up what stands, or clear it away and note what begins."""
        assert self.lock is not None
        self.lock.truncate(0)
        begun, standing = self._begun(), _identity(self.output)
        if begun is None and nothing_left(self.output, overwrite):  # it was joined while this process came in
            self._clear_up()
            return False
        if begun is not None and standing and begun["replaces"] != standing and not overwrite:
            self._clear_up()  # stopped between joining and clearing up
            return False
        refuse_existing(self.output, overwrite)
        begins = {"settings": wanted, "replaces": standing}
        if begun is None or (overwrite and begun != begins):
            # The settings go first: without them nothing counts that a death leaves here.
            for path in [self.settings, *self.folder.iterdir()]:
                if path.name != "lock":
                    path.unlink(missing_ok=True)
            begun = None
        self._read_manifests(everyone=True)
        # Where no part is done, what was begun may change; but answers that were paid for are not thrown away.
        if begun is None or not (self.entries or any(self.folder.glob("journal-*"))):
            write_text(self.settings, json.dumps(begins, indent=1))
        return True

    def _refuse_other(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        cure = "run with those to finish it, or give --overwrite to begin anew"
        refuse_other_settings(found, wanted, f"{self.folder} holds unfinished work with other settings", cure)
        self._read_manifests(everyone=True)

    def _clear_up(self) -> None:
        """Remove the folder: it goes at once, or stands and shows that its parts were joined."""
        removed = _removed(self.output)
        shutil.rmtree(removed, ignore_errors=True)
        self.folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    # -- parts

    def part(self, step: int, number: int) -> Path:
        """The last step's parts are what is joined."""
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
        """The checksum of a part made of the input ``origin``; ``None`` where another process is at it."""
        self.made_here = False
        found = self._standing(step, number, origin)
        if found is None:
            with self._claimed(step, number) as mine:
                if not mine:
                    return None
                self._read_manifests()
                found = self._standing(step, number, origin)
                if found is None:
                    self.counts.clear()
                    found = self._write(step, number, origin, work(read(), done))
                    self.made_here = True
        return found

    @contextlib.contextmanager
    def _claimed(self, step: int, number: int) -> Iterator[bool]:
        """Hold a part, if nobody else does: the system's lock on one byte of a file, which a dying process drops."""
        place = number * self.steps + step
        assert self.claims is not None
        try:
            fcntl.lockf(self.claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.claims, fcntl.LOCK_UN, 1, place)

    def _standing(self, step: int, number: int, origin: str) -> str | None:
        """The checksum of a part that stands whole and was made of the input whose checksum is ``origin``."""
        entry, path = self.entries.get((step, number)), self.part(step, number)
        if entry is None or entry.input != origin or not path.exists() or checksum_of_file(path) != entry.sha256:
            return None
        return entry.sha256

    def _read_manifests(self, everyone: bool = False) -> None:
        """Take up what was written since the last time, by the processes known or by ``everyone`` who was ever here."""
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
                    with contextlib.suppress(ValueError):  # a torn line that another process has closed
                        entry = json.loads(line)
                        self.entries[entry["step"], entry["part"]] = _Entry(
                            entry["sha256"], entry["input"], entry["counts"]
                        )

    def _write(self, step: int, number: int, origin: str, records: Iterable[Record]) -> str:
        """Write one part whole, then enter it in this process's manifest."""
        path = self.part(step, number)
        with replacing(path, tidy=False) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(record_line(record) + "\n")
        entry = _Entry(checksum_of_file(path), origin, dict(self.counts))
        append_line(self.manifest, json.dumps({"step": step, "part": number, **vars(entry)}), sync=True)
        fsync_folder(self.folder)
        self.entries[step, number] = entry
        return entry.sha256

    # -- the end

    def join(self, origins: Sequence[str]) -> bool:
        """Join the parts into the output, or find it joined; false where there are parts left to do after all."""
        assert self.lock is not None
        fcntl.flock(self.lock, fcntl.LOCK_EX)  # waits until no other process works here
        if self._gone():
            if not self.output.exists():
                raise UserError(f"{self.folder} was removed while work went on in it: run the same command again")
            self.lock.seek(0)
            self._total(json.loads(self.lock.read() or "[]"))
            return True
        self._read_manifests()
        whole: list[str | None] = list(origins)
        for step in range(self.steps):
            whole = [origin and self._standing(step, number, origin) for number, origin in enumerate(whole)]
        if missing := whole.count(None):
            log.info(f"{missing} parts were left undone by a process that ended too early: done here")
            fcntl.flock(self.lock, fcntl.LOCK_SH)
            return False
        write_records(self.output, self._records(len(origins)), overwrite=True)
        counted = [self.entries[step, number].counts for step in range(self.steps) for number in range(len(origins))]
        self._total(counted)
        self.lock.write(json.dumps([self.counts]))  # for those who wait with the file open
        self.lock.flush()
        self._clear_up()
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
        found = path.stat()
    except OSError:
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _process_start() -> float:
    """When this process began, in seconds since the epoch: processes that were launched together began together."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
