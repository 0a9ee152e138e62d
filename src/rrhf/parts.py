"""Long work on records in parts that are written once, whole: what a stopped run has done is never done again.

Beside the output stands ``OUTPUT.parts/`` with one file a part and a manifest of their checksums. A part counts only
when the manifest names it and its checksum fits, so a process may die at any moment. When all parts are there they
are joined into the output, and the folder goes. Several processes (RANK and WORLD_SIZE, as torchrun sets them) share
the parts out; the last one to finish joins them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rrhf.errors import UserError
from rrhf.files import fsync_folder, refuse_existing, replacing
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
        overwrite: replace an output that exists, and begin anew.
        description: of the progress bar.
        total: how many records there are, where known.

    Returns:
        The number of input records.

    Raises:
        UserError: the output exists, or its unfinished parts were made with other settings.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = output.with_name(output.name + ".parts")
    if output.exists() and folder.exists() and not overwrite:  # stopped between joining and clearing up
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    refuse_existing(output, overwrite)
    store = _Parts(folder, rank)
    if overwrite and rank == 0 and world == 1:
        shutil.rmtree(folder, ignore_errors=True)
    store.open(settings)
    count = number = 0
    stream = iter(records)
    with Progress(description, total, "records") as bar:
        while block := list(islice(stream, part_size)):
            count += len(block)
            if store.done(number):
                bar.update(len(block))
            elif number % world == rank:
                store.write(number, work(block, bar.update))
            number += 1
    if not number:
        raise UserError(f"{output}: there is no record to work on")
    store.join(number, output)
    return count


class _Parts:
    """The folder of parts of one output."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.manifest = folder, folder / f"manifest-{rank:05d}.jsonl"
        self.sums: dict[int, str] = {}

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:07d}.jsonl"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Make the folder or take up what is there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made: {error.strerror}; choose another --output") from error
        wanted = json.loads(json.dumps(settings, sort_keys=True))
        place = self.folder / "settings.json"
        if place.exists():
            found = json.loads(place.read_text(encoding="utf-8"))
            different = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
            if different:
                changes = "; ".join(f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}" for name in different)
                raise UserError(
                    f"{self.folder} holds unfinished work with other settings ({changes}): run with those to finish "
                    "it, or give --overwrite to begin anew"
                )
        else:
            with replacing(place) as temporary:
                temporary.write_text(json.dumps(wanted, indent=1, sort_keys=True), encoding="utf-8")
        self._read_manifests()

    def _read_manifests(self) -> None:
        for manifest in sorted(self.folder.glob("manifest-*.jsonl")):
            for line in manifest.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line that a dying process left unfinished
                    entry = json.loads(line)
                    self.sums[entry["part"]] = entry["sha256"]

    def done(self, number: int) -> bool:
        """Whether a part stands whole."""
        known = self.sums.get(number)
        return known is not None and self.part(number).exists() and _checksum(self.part(number)) == known

    def write(self, number: int, records: Iterable[Record]) -> None:
        """Write one part whole, then enter it in this process's manifest."""
        with replacing(self.part(number)) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(record_line(record) + "\n")
        checksum = _checksum(self.part(number))
        with self.manifest.open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                file.write(b"\n")
            file.write(json.dumps({"part": number, "sha256": checksum}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(self.folder)
        self.sums[number] = checksum

    def join(self, count: int, output: Path) -> None:
        """Join the parts into ``output`` if all are there; the process that finds them so does it."""
        with contextlib.suppress(FileNotFoundError), (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read_manifests()
            if not all(self.done(number) for number in range(count)):
                return
            write_records(output, self._records(count), overwrite=True)
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


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
