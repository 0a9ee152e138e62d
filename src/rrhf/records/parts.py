"""Long work on records in parts that are written once, whole: what a stopped run has done is never done again.

Each part goes through the steps of the work; what it comes to is kept in a folder beside the output (``PartsFolder``),
so a process may die at any moment. When all parts are there they are joined into the output, and the folder goes.

Any number of processes (RANK and WORLD_SIZE, as torchrun sets them) share the parts out: each takes the next one that
nobody has done or is doing. Nobody waits for a process that died: the others do its parts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.progress import Progress
from rrhf.records.checksums import checksum_of_records
from rrhf.records.elsewhere import Away, Elsewhere, Pool, Read, read_parts
from rrhf.records.files import WRITERS, file_suffix
from rrhf.records.parts_folder import Finish, PartsFolder, Work
from rrhf.records.record import Record

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
    finish: Finish | None = None,
    elsewhere: Elsewhere | None = None,
) -> int:
    """Run ``steps`` over ``records``, a part at a time, and write what the last returns to ``output`` in order.

    A part that an earlier, stopped run made is used again only if it was made with the same ``settings`` (others are
    refused) and of the same input: the checksum of each part's input records is kept with it, and where the input has
    changed since, the part is made again.

    Args:
        records: streams the input; it must be the same at every call.
        output: a record file (.jsonl, .jsonl.gz or .parquet).
        steps: name (shown with the progress) → work. A work takes a part's records and a callback for progress
            (records done), and returns the part's results in order; the next step gets those. A process takes all
            its parts through one step before it begins the next.
        settings: what the results depend on besides the records; parts made with others are refused.
        part_size: records a part.
        overwrite: replace an output that exists, and begin anew; but parts that were begun to replace this very output
            with the same settings are gone on with, so that the same command can be stopped and run again.
        counts: works add to it what they count. In the end it holds the sum over all parts, whoever did them and when.
        total: how many records there are, where known.
        finish: what needs all results at once: given a function that streams them in order, as often as it is called,
            it returns what is written instead of them. It runs in the one process that joins the parts, and again
            where that process dies.
        elsewhere: steps that other processes do; this one hands out their parts and keeps what comes back.

    Returns:
        The number of input records; 0 where the work was done before this process began.

    Raises:
        UserError: the output exists or cannot be written, or its unfinished parts were made with other settings.
    """
    file_suffix(output, WRITERS)
    folder = PartsFolder(output, len(steps), Counter() if counts is None else counts)
    try:
        if not folder.open(json.loads(json.dumps(settings)), overwrite):
            return 0
        while True:
            sizes, checksums = _work_through(records, steps, folder, part_size, total, elsewhere)
            if not sizes:
                raise UserError(f"{output}: there is no record to work on")
            if folder.join(checksums, finish):
                return sum(sizes)
    finally:
        folder.close()


def _work_through(
    records: Callable[[], Iterable[Record]],
    steps: Mapping[str, Work],
    folder: PartsFolder,
    part_size: int,
    total: int | None,
    elsewhere: Elsewhere | None,
) -> tuple[list[int], list[str]]:
    """Do what nobody has done or is doing; the sizes of the input's parts and their checksums."""
    sizes: list[int] = []
    checksums: list[str] = []

    def cut() -> Iterator[Input]:
        for block in _cut(records, part_size):
            sizes.append(len(block))
            checksums.append(checksum_of_records(block))  # before work, which may change the records
            yield checksums[-1], partial(list, block)

    inputs: Iterable[Input] = cut()
    for step, (description, work) in enumerate(steps.items()):
        made: list[str | None] = []
        if elsewhere is not None and description in elsewhere.steps:
            origins = [origin for origin, _ in inputs]
            source: Read = partial(_read_input, records, part_size)
            if step:
                files = {number: folder.part(step - 1, number) for number in range(len(origins))}
                source = partial(read_parts, files)
            with Progress(description, total, "records") as bar:
                away = elsewhere.steps[description]
                made = _made_elsewhere(folder, step, origins, sizes, source, elsewhere.pool, away, bar)
            inputs = [(checksum, partial(folder.records, step, number)) for number, checksum in enumerate(made)]
            continue
        with Progress(description, total, "records") as bar:
            for number, (origin, read) in enumerate(inputs):
                made.append(None if origin is None else folder.make(step, number, origin, read, work, bar.update))
                if made[-1] is not None and not folder.made_here:
                    bar.update(sizes[number])
        inputs = [(checksum, partial(folder.records, step, number)) for number, checksum in enumerate(made)]
    return sizes, checksums


def _cut(records: Callable[[], Iterable[Record]], part_size: int) -> Iterator[list[Record]]:
    stream = iter(records())
    while block := list(islice(stream, part_size)):
        yield block


def _read_input(
    records: Callable[[], Iterable[Record]], part_size: int, numbers: Collection[int]
) -> Iterator[tuple[int, list[Record]]]:
    wanted, last = set(numbers), max(numbers, default=-1)
    for number, block in enumerate(islice(_cut(records, part_size), last + 1)):
        if number in wanted:
            yield number, block


def _made_elsewhere(
    folder: PartsFolder,
    step: int,
    origins: list[str | None],
    sizes: list[int],
    read: Read,
    pool: Pool,
    away: Away,
    bar: Progress,
) -> list[str | None]:
    """The checksums of a step's parts; those that nobody has made yet are made by the pool."""
    made = [origin and folder.made(step, number, origin) for number, origin in enumerate(origins)]
    bar.update(sum(size for size, checksum in zip(sizes, made) if checksum))
    missing = [number for number, origin in enumerate(origins) if origin and not made[number]]
    if missing:
        for number, records, counts in pool.make(bar.description, away, missing, read):
            made[number] = folder.keep(step, number, str(origins[number]), records, counts)
            bar.update(sizes[number])
    return made
