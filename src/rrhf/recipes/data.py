"""The data stage: where a run's queries come from, and which of them are held out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.imports import call_own, load_function
from rrhf.common.presentation import describe_counts
from rrhf.common.remote import fetched, refuse_keys
from rrhf.recipes.config import DataSettings
from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import write_records
from rrhf.records.formats import load_dataset_records
from rrhf.records.ids import Ids
from rrhf.records.record import Record, record_from_row

log = logging.getLogger("rrhf")

SOURCE_USAGE = "a function f(limit, seed) that returns records"


def data_digests(settings: DataSettings) -> dict[str, str]:
    """The checksums of the data files, here and at URLs, that a run's queries come from."""
    found = {}
    for name in (settings.source, settings.held_out):
        if name is not None:
            refuse_keys(name)
            path = fetched(name)
            if path.is_file():
                found[name] = checksum_of_file(path)
    return found


def _read(source: str, settings: DataSettings, limit: int | None, counts: Counter[str]) -> Iterator[Record]:
    if ":" in source and not Path(source).exists() and "/" not in source:
        what = f"data source {source!r}"
        rows = call_own(
            partial(load_function(source, "data source", SOURCE_USAGE), limit=limit, seed=settings.seed), what
        )
        if not isinstance(rows, Iterable):
            raise UserError(f"{what} gave {type(rows).__name__}: it must be {SOURCE_USAGE}")
        return _own_records(source, what, iter(rows))
    return load_dataset_records(source, settings.format, settings.split, limit, counts)


def _own_records(source: str, what: str, rows: Iterator[Any]) -> Iterator[Record]:
    """The records of a function of the user's, which may fail at any of them; those of a query that repeats get ids.

    The file that they are written to could not be read with an id twice.
    """
    end, ids, number = object(), Ids(), 0
    while (row := call_own(next, what, rows, end)) is not end:
        number += 1
        record = row if isinstance(row, Record) else record_from_row(row, f"{source}, row {number}")
        yield replace(record, id=ids.claim(record.id, number))


def training_records(settings: DataSettings) -> Iterator[Record]:
    """The records that ``write_queries`` takes queries from, in a stream; those held out are among them."""
    counts: Counter[str] = Counter()
    records = _read(settings.source, settings, settings.limit, counts)
    return records if settings.provided else (record.without_responses() for record in records)


def set_aside_records(settings: DataSettings) -> list[Record]:
    """As many held-out records as ``write_queries`` takes, none of them among those that it writes to either file.

    Raises:
        UserError: the data has not so many, or ``limit`` does not say how many are trained on.
    """
    count, counts = settings.held_out_limit, Counter[str]()
    if settings.limit is None:
        raise UserError("data.limit: prompts can be set aside where it says how many are trained on")
    same = settings.held_out is None  # held-out records come first, then those to train on
    read = settings.limit + (count if same else 0)
    seen = {json.dumps(record.query) for record in _read(settings.source, settings, read, counts)}
    start = read if same else count
    records = _read(settings.held_out or settings.source, settings, start + 2 * count, counts)
    fresh = [record for record in islice(records, start, None) if json.dumps(record.query) not in seen][:count]
    if len(fresh) < count:
        raise UserError(
            f"data: only {len(fresh)} of {count} held-out records can be set aside; lower data.held_out_limit"
        )
    return fresh


def write_queries(settings: DataSettings, queries: Path, held_out_file: Path) -> None:
    """Write the records to train on to ``queries`` and then the held-out ones; no query stands in both.

    Raises:
        UserError: the data cannot be read, or no record is left for one of the two.
    """
    counts: Counter[str] = Counter()
    wanted = settings.limit
    if settings.held_out is not None:
        held_out = list(_read(settings.held_out, settings, settings.held_out_limit, counts))
        records = _read(settings.source, settings, wanted, counts)
    else:
        both = _read(settings.source, settings, None if wanted is None else wanted + settings.held_out_limit, counts)
        held_out = list(islice(both, settings.held_out_limit))
        records = both
    first = next(records, None)
    if not held_out:
        raise UserError(f"data: {settings.held_out or settings.source} has no records: none can be held out")
    if first is None and settings.held_out is not None:
        raise UserError(f"data: {settings.source} has no records: there is none to train on")
    if first is None:
        raise UserError(
            f"data: {settings.source} has too few records: {len(held_out)} are held out and none is left to train on; "
            "lower data.held_out_limit"
        )
    held_out_queries = {json.dumps(record.query) for record in held_out}
    training = (record for record in chain([first], records) if json.dumps(record.query) not in held_out_queries)
    if not settings.provided:
        training = (record.without_responses() for record in training)
    kept = next(training, None)
    if kept is None:  # known before a file is written, which would bind the run to these settings
        raise UserError(f"data: every query of {settings.source} is held out, none is left to train on")
    count = write_records(queries, chain([kept], training), overwrite=True)
    write_records(held_out_file, held_out, overwrite=True)
    dropped = describe_counts(counts)
    log.info(f"data: {count} queries to train on, {len(held_out)} held out{'; ' + dropped if dropped else ''}")
