"""Long work on records in parts that are written once, whole: what a stopped run has done is never done again.

Beside the output stands ``OUTPUT.parts/`` with one file a part and a manifest of their checksums. A part counts only
when the manifest names it, its checksum fits and it was made of the same input, so a process may die at any moment.
When all parts are there they are joined into the output, and the folder goes. Several processes (RANK and WORLD_SIZE,
as torchrun sets them) share the parts out; the last one to finish joins them: each holds a shared lock while it works,
and an exclusive one to join.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rrhf.errors import UserError
from rrhf.files import fsync_folder, refuse_existing, replacing, write_text
from rrhf.progress import Progress
from rrhf.records import Record, read_records, record_line, write_records

Work = Callable[[list[Record], Callable[[int], None]], Iterable[Record]]


def in_parts(
    records: Iterable[Record],
    output: Path,
    work: Work,
    settings: Mapping[str, Any],
    *,
    part_size: int,
    overwrite: bool = False,
    description: str = "records",
    total: int | None = None,
) -> int:
    """Run ``work`` over ``records``, a part at a time, and write what it returns to ``output`` in order.

    Args:
        records: the input, streamed; it must be the same again when a stopped run goes on.
        output: a record file (.jsonl, .jsonl.gz or .parquet).
        work: takes a part's records and a callback for progress (records done), returns the part's results in order.
        settings: what the results depend on; parts made with others are refused.
        part_size: records a part.
        overwrite: replace an output that exists, and begin anew; but parts that were begun to replace this very output
            with the same settings are gone on with, so that the same command can be stopped and run again.
        description: of the progress bar.
        total: how many records there are, where known.

    Returns:
        The number of input records.

    Raises:
        UserError: the output exists, or its unfinished parts were made with other settings.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = output.with_name(output.name + ".parts")
    store = _Parts(folder, rank)
    begun, standing = store.begun(), _identity(output)
    joined = standing and begun and begun["replaces"] != standing
    if joined and not overwrite:  # stopped between joining and clearing up
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    if rank and standing and not overwrite and begun is None:
        return 0  # the other processes were done before this one began, or the first one refuses
    refuse_existing(output, overwrite)
    wanted = json.loads(json.dumps(settings))
    if overwrite and world == 1 and not (standing and begun == {"settings": wanted, "replaces": standing}):
        shutil.rmtree(folder, ignore_errors=True)
    with store.entered():
        if _identity(output) != standing:  # the other processes were done while this one began
            shutil.rmtree(folder, ignore_errors=True)
            return 0
        store.open(wanted, standing)
        count = number = 0
        origins: list[str] = []
        stream = iter(records)
        with Progress(description, total, "records") as bar:
            while block := list(islice(stream, part_size)):
                count += len(block)
                origin = _origin(block)  # before work, which may change the records
                if store.done(number, origin):
                    bar.update(len(block))
                elif number % world == rank:
                    store.write(number, origin, work(block, bar.update))
                origins.append(origin)
                number += 1
        if not number:
            raise UserError(f"{output}: there is no record to work on")
        store.join(origins, output)
    return count


class _Parts:
    """The folder of parts of one output."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.manifest = folder, folder / f"manifest-{rank:05d}.jsonl"
        self.lock: IO[str]
        self.sums: dict[int, tuple[str, str]] = {}  # part → checksums of its file and of its input

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:07d}.jsonl"

    def begun(self) -> Any:
        """What the parts here were begun with, ``None`` where there are none."""
        try:
            return json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Make the folder, or come into the one that is there; no other process clears it up meanwhile."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("a")
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made: {error.strerror}; choose another --output") from error
        with lock:
            self.lock = lock
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def open(self, wanted: dict[str, Any], replaces: list[int] | None) -> None:
        """Take up what is there, or note what begins."""
        begun = self.begun()
        self._read_manifests()
        if begun is not None and self.sums:
            found = begun["settings"]
            different = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
            if different:
                changes = "; ".join(f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}" for name in different)
                raise UserError(
                    f"{self.folder} holds unfinished work with other settings ({changes}): run with those to finish "
                    "it, or give --overwrite to begin anew"
                )
        else:
            write_text(self.folder / "settings.json", json.dumps({"settings": wanted, "replaces": replaces}, indent=1))

    def _read_manifests(self) -> None:
        for manifest in sorted(self.folder.glob("manifest-*.jsonl")):
            for line in manifest.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line that a dying process left unfinished
                    entry = json.loads(line)
                    self.sums[entry["part"]] = (entry["sha256"], entry["input"])

    def done(self, number: int, origin: str) -> bool:
        """Whether a part stands whole and was made of the input whose checksum is ``origin``."""
        known = self.sums.get(number)
        return known is not None and self.part(number).exists() and (_checksum(self.part(number)), origin) == known

    def write(self, number: int, origin: str, records: Iterable[Record]) -> None:
        """Write one part whole, then enter it in this process's manifest."""
        with replacing(self.part(number), tidy=False) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(record_line(record) + "\n")
        checksum = _checksum(self.part(number))
        with self.manifest.open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                file.write(b"\n")
            entry = {"part": number, "sha256": checksum, "input": origin}
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(self.folder)
        self.sums[number] = (checksum, origin)

    def join(self, origins: Sequence[str], output: Path) -> None:
        """Join the parts into ``output`` if all are there; the process that finds them so does it."""
        fcntl.flock(self.lock, fcntl.LOCK_EX)  # waits until no other process works here
        self._read_manifests()
        if not all(self.done(number, origin) for number, origin in enumerate(origins)):
            return  # there is work left, or another process has joined the parts and cleared up
        write_records(output, self._records(len(origins)), overwrite=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _records(self, count: int) -> Iterator[Record]:
        for number in range(count):
            if self.part(number).stat().st_size:
                yield from read_records(self.part(number))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _origin(block: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    for record in block:
        digest.update(record_line(record).encode() + b"\n")
    return digest.hexdigest()


def _identity(path: Path) -> list[int] | None:
    """What tells a file from another that replaced it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
