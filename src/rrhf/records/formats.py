"""Other people's data sets as records: where their rows come from, which format they have, what became of them.

A format function takes a row as a dictionary and returns a dictionary with our columns (``query``, ``responses``,
``sources``, ``scores``, ``rewards``; unknown columns travel along), or None or a ``SkipRowError`` where the row cannot
be used; one marked ``@grouped`` takes all rows of a query at once. A new format is a function in ``records/foreign/``,
a line in ``FORMATS`` and one in ``COLUMNS``; outsiders pass ``pkg.module:function``.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError, nearest
from rrhf.common.imports import call_own, load_function
from rrhf.common.remote import fetched
from rrhf.records.files import NOTHING_LEFT, READERS, file_suffix, read_records, read_rows, require_file, text_lines
from rrhf.records.foreign.instructions import (
    PROMPT_COLUMNS,
    alpaca,
    alpacafarm,
    dolly,
    imdb,
    prompt_completion,
    prompts,
    vicuna,
)
from rrhf.records.foreign.pairs import LAST_TURN, hh, hh_chat, preference, sharegpt, static
from rrhf.records.foreign.ratings import gpt4_llm, helpsteer, ultrafeedback, ultrafeedback_binarized
from rrhf.records.foreign.rewardbench import rewardbench
from rrhf.records.foreign.rows import PAIR_RATINGS, ForeignRow, Format, SkipRowError
from rrhf.records.ids import Ids
from rrhf.records.parquet import read_parquet
from rrhf.records.record import EmptyResponses, Record, Row, RowError, plain, record_from_row


def rrhf(row: ForeignRow) -> ForeignRow:
    """Our own record, and the released RRHF code's ``query``, ``responses``, ``scores``."""
    return row


FORMATS: dict[str, Format] = {
    "rrhf": rrhf,
    "hh": hh,
    "hh-chat": hh_chat,
    "static": static,
    "preference": preference,
    "ultrafeedback": ultrafeedback,
    "ultrafeedback-binarized": ultrafeedback_binarized,
    "gpt4-llm": gpt4_llm,
    "helpsteer": helpsteer,
    "rewardbench": rewardbench,
    "alpaca": alpaca,
    "dolly": dolly,
    "alpacafarm": alpacafarm,
    "vicuna": vicuna,
    "prompt-completion": prompt_completion,
    "sharegpt": sharegpt,
    "imdb": imdb,
    "prompts": prompts,
}

# What each format needs. The first whose columns are all there is the guess; where two share theirs the values decide.
COLUMNS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"query", "responses"}), "rrhf"),
    *((frozenset({"query", "chosen", "rejected", *ratings}), "ultrafeedback-binarized") for ratings in PAIR_RATINGS),
    (frozenset({"query", "chosen", "rejected"}), "preference"),
    (frozenset({"query"}), "rrhf"),
    (frozenset({"instruction", "outputs"}), "alpacafarm"),
    (frozenset({"instruction", "completions"}), "ultrafeedback"),
    (frozenset({"instruction", "chosen_response", "rejected_response", *PAIR_RATINGS[2]}), "ultrafeedback-binarized"),
    (frozenset({"conversations"}), "sharegpt"),
    *((frozenset({"chosen", "rejected", *ratings}), "ultrafeedback-binarized") for ratings in PAIR_RATINGS),
    (frozenset({"user_input", "responses_and_scores"}), "gpt4-llm"),
    (frozenset({"user_input", "completion_a", "completion_b"}), "gpt4-llm"),
    (frozenset({"prompt", "response", "helpfulness"}), "helpsteer"),
    (frozenset({"instruction", "output"}), "alpaca"),
    (frozenset({"turns"}), "vicuna"),
    (frozenset({"prompt", "chosen", "rejected", "subset"}), "rewardbench"),
    (frozenset({"prompt", "response", "chosen", "rejected"}), "static"),
    *((frozenset({name, "chosen", "rejected"}), "preference") for name in ("prompt", "instruction", "question")),
    (frozenset({"chosen", "rejected"}), "preference"),
    (frozenset({"chosen", "rejected"}), "hh"),  # where they are dialogues
    (frozenset({"chosen", "rejected"}), "hh-chat"),  # never guessed
    (frozenset({"prompt", "completion"}), "prompt-completion"),
    (frozenset({"text", "label"}), "imdb"),
    (frozenset({"review"}), "imdb"),
    (frozenset({"instruction", "response"}), "dolly"),
    *((frozenset({name}), "prompts") for name in PROMPT_COLUMNS),
)

LOOKED_AT = 100  # rows by which a format is told

# Responses, or a context, beside a prompt, which ``prompts`` would leave behind: such rows are no queries alone.
# A column ``answer`` is no response: rewards hold responses against it.
ANSWER = re.compile(r"(output|response|completion)s?(_[0-9a-z])?|answers?_[0-9a-z]")


def guess_format(row: ForeignRow, source: str) -> str:
    """Return the format that the columns of ``row`` belong to.

    Raises:
        UserError: none is known; the message lists the columns found and what each format needs.
    """
    columns = {name for name, value in row.items() if value is not None}
    for needed, name in COLUMNS:
        if needed <= columns:
            if name == "prompts":
                _refuse_to_leave_behind(columns, source)
            dialogue = isinstance(row.get("chosen"), str) and LAST_TURN in row["chosen"]
            return "hh" if name == "preference" and "prompt" not in columns and dialogue else name
    raise UserError(
        f"{source}: cannot tell the format from the columns {', '.join(map(str, row)) or '(none)'}. Each needs:\n"
        + "".join(f"  {name}: {needed_columns(name)}\n" for name in FORMATS)
        + "rename the columns, or give --format, one of these or pkg.module:function"
    )


def _refuse_to_leave_behind(columns: set[str], source: str) -> None:
    """Raise UserError where ``prompts`` would not read all that belongs to a query and its responses."""
    answers = sorted(filter(ANSWER.fullmatch, columns))
    left = f"the responses in {', '.join(answers)}" if answers else ""
    if {"instruction", "context"} <= columns:
        left = f"the context beside instruction{left and ' and '}{left}"
    if left:
        raise UserError(
            f"{source}: no format is known that reads {left}: give --format pkg.module:function, or --format prompts "
            "for the queries alone"
        )


def needed_columns(name: str) -> str:
    """The columns that a format needs, in words; the ways are apart by "or"."""
    ways = [", ".join(sorted(needed)) for needed, other in COLUMNS if other == name]
    return " or ".join(ways) or "not said"


def load_format(name: str) -> Format:
    """Return the format function called ``name``, or import it where the name is ``pkg.module:function``.

    Raises:
        UserError: there is none; the message lists the known ones and suggests the nearest.
    """
    if name in FORMATS:
        return FORMATS[name]
    if ":" not in name:
        raise UserError(f"unknown format {name!r}: {nearest(name, FORMATS)}, or pkg.module:function")
    function = load_function(name, "format", "a function from a row to a row")

    @functools.wraps(function)  # with what ``@grouped`` has noted on it
    def format(row: ForeignRow) -> ForeignRow | None:
        return call_own(function, f"format {name!r}", row, passing=SkipRowError)

    return format


# --- sources -----------------------------------------------------------------------------------------------------


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # texts are longer than the 128 KiB a cell may have
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise RowError(where, "more cells than the header has columns", "quote cells that hold commas")
                yield dict(row), where, reader.line_num
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}): save the file as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}): mend the line") from error


def _txt_rows(path: Path) -> Iterator[Row]:
    for text, number in text_lines(path):
        yield {"prompt": text.strip()}, f"{path}, line {number}", number


FILE_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    **dict.fromkeys(READERS, read_rows),
    ".csv": _csv_rows,
    ".txt": _txt_rows,
}


def _is_file(source: str) -> bool:
    """Whether ``source`` means a local file rather than a data set: it exists as one, or ends as one would."""
    return Path(source).is_file() or (source.lower().endswith(tuple(FILE_READERS)) and not Path(source).is_dir())


def file_rows(path: Path) -> Iterator[Row]:
    """Rows of a local file of any kind that is known. Raises UserError at once where there is none."""
    reader = FILE_READERS[file_suffix(path, FILE_READERS)]
    require_file(path)
    return reader(path)


def _parquet_files(source: str, split: str, config: str | None, data_dir: str | None) -> list[Path]:
    """The files of a split of a folder, as the datasets library finds them, where all are Parquet; else none.

    The library takes files of unlike columns for broken, and texts for texts where ours stand for JSON values.
    """
    import datasets

    found = datasets.load_dataset_builder(source, config, data_dir=data_dir).config.data_files or {}
    files = [Path(file) for file in found.get(split, [])]
    return files if all(file.suffix.lower() == ".parquet" for file in files) else []


def _library_rows(source: str, split: str, config: str | None, data_dir: str | None) -> Iterator[Row]:
    """Rows of a data set's id, of a folder of data files, or of a folder that ``save_to_disk`` wrote."""
    import datasets

    failures = (OSError, ValueError, LookupError, ImportError, RuntimeError, datasets.exceptions.DatasetsError)
    folder = Path(source)
    if not folder.exists() and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise UserError(f"{source}: no such file or folder: check the name")
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(source)
            rows = saved[split] if isinstance(saved, dict) else saved
        elif folder.is_dir() and (files := _parquet_files(source, split, config, data_dir)):
            for file in files:
                yield from read_parquet(file)
            return
        else:
            # Streamed: a data set larger than the disk can be read, and --limit fetches no more than it needs.
            rows = datasets.load_dataset(source, config, data_dir=data_dir, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield dict(row), f"{source}, row {number}", number
    except failures as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{source}: cannot read split {split!r} ({reason}): check the name, the split and the network, "
            "or give a local file"
        ) from error


# --- records -----------------------------------------------------------------------------------------------------


def load_dataset_records(
    source: str | Path,
    format: str | None = None,
    split: str = "train",
    limit: int | None = None,
    counts: Counter[str] | None = None,
    config: str | None = None,
    data_dir: str | None = None,
    queries_only: bool = False,
) -> Iterator[Record]:
    """Read records out of a data set in any known format.

    Dirty rows are dropped and counted: rows the format cannot use, empty responses, records that keep none. In our
    own format only empty responses are; any other fault there is an error.

    Args:
        source: a .jsonl, .jsonl.gz, .json, .parquet, .csv or .txt file, a folder, the URL of one of these, or a data
            set's id on the hub.
        format: a name in ``FORMATS`` or ``pkg.module:function``; guessed from the columns of the first rows when None.
        split: which split of a folder or hub data set. A file has none.
        limit: stop after so many records.
        counts: counts what was dropped, by reason.
        config: the hub data set's configuration.
        data_dir: the hub data set's folder, such as ``harmless-base`` in Anthropic's HH.
        queries_only: without the responses, so that empty ones drop no record.

    Raises:
        UserError: at once for an unknown format, suffix or missing file; while reading where the source is broken,
            its format cannot be told, or no row gives a record.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: it must be at least 1, or left out")
    convert = load_format(format) if format is not None else None
    name = str(fetched(source))
    rows = file_rows(Path(name)) if _is_file(name) else _library_rows(name, split, config, data_dir)
    counter = Counter[str]() if counts is None else counts
    # "error" is for stages that need responses: here it leaves empty ones as they are.
    records = _records(name, rows, convert, counter, "error" if queries_only else "drop")
    found = _first(records, limit)
    return (record.without_responses() for record in found) if queries_only else found


def _first(records: Generator[Record], limit: int | None) -> Iterator[Record]:
    """Yield ``limit`` records and close what they come from, whose threads would else outlive it."""
    with contextlib.closing(records):
        yield from itertools.islice(records, limit)


def _records(
    source: str, rows: Iterator[Row], convert: Format | None, counts: Counter[str], empty_responses: EmptyResponses
) -> Generator[Record]:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source}: holds no rows: check that what wrote it finished")
    seen = [first]
    if convert is None:
        if not isinstance(first[0], dict):
            raise RowError(first[1], "a row must be an object", "give a file of objects")
        seen, rows = _looked_at(first, rows)
        convert = FORMATS[guess_format(_filled(seen), source)]
    rows = itertools.chain(seen, rows)
    if convert is rrhf and _is_file(source) and source.lower().endswith(tuple(READERS)):
        yield from read_records(source, empty_responses=empty_responses, counts=counts)
    else:
        column = getattr(convert, "group_by", None)
        if column:
            rows = _grouped(rows, column)
        found = ", ".join(map(str, first[0])) if isinstance(first[0], dict) else "none"
        yield from _foreign_records(source, rows, convert, counts, found, empty_responses)


def _looked_at(first: Row, rows: Iterator[Row]) -> tuple[list[Row], Iterator[Row]]:
    """The first rows, by which a format is told, and those behind them, among which a broken one has its place."""
    seen, failed = [first], list[UserError]()
    try:
        for row in itertools.islice(rows, LOOKED_AT - 1):
            seen.append(row)
    except UserError as error:
        failed.append(error)

    def behind() -> Iterator[Row]:
        for error in failed:
            raise error
        yield from rows

    return seen, behind()


def _filled(rows: Iterable[Row]) -> ForeignRow:
    """Each column with the first value that a row has in it: what one row lacks, another may have."""
    found: ForeignRow = {}
    for row, *_ in rows:
        for name, value in row.items() if isinstance(row, dict) else ():
            if found.get(name) is None:
                found[name] = value
    return found


def _grouped(rows: Iterable[Row], column: str) -> Iterator[Row]:
    """Rows in succession with one value of ``column`` as one row, at the place of the first; see ``grouped``."""
    group: Row | None = None
    for row, where, number in rows:
        value = row.get(column) if isinstance(row, dict) else None
        if group is not None and value is not None and group[0].get(column) == value:
            group[0]["rows"].append(row)
            continue
        if group is not None:
            yield group
        group = ({column: value, "rows": [row]}, where, number) if value is not None else None
        if group is None:
            yield row, where, number
    if group is not None:
        yield group


def _foreign_records(
    source: str,
    rows: Iterable[Row],
    convert: Format,
    counts: Counter[str],
    columns: str,
    empty_responses: EmptyResponses,
) -> Iterator[Record]:
    ids = Ids()
    skipped = Counter[str]()
    empty = True
    for row, where, number in rows:
        record, reason = _foreign_record(row, where, convert, counts, empty_responses)
        if record is None:
            skipped[reason] += 1
            counts[reason] += 1
            continue
        record.id = ids.claim(record.id, number)
        empty = False
        yield record
    if empty:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common(5))
        name = next((name for name, format in FORMATS.items() if format is convert), "")
        needs = f"; {name} needs {needed_columns(name)}" if name else ""
        raise UserError(
            f"{source}: no row gave a record: {reasons}; the first has the columns {columns}{needs}: "
            f"check --format, one of {', '.join(FORMATS)}"
        )


def _foreign_record(
    row: Any, where: str, convert: Format, counts: Counter[str], empty_responses: EmptyResponses
) -> tuple[Record | None, str]:
    """Return the record of a foreign row, or None and why there is none."""
    if not isinstance(row, dict):
        return None, "a row that is no object"
    try:
        converted = convert(row)
        if converted is None:
            return None, "skipped by the format"
        record = record_from_row(plain(converted), where, empty_responses=empty_responses, counts=counts)
    except SkipRowError as skip:
        return None, str(skip)
    except RowError as fault:
        return None, fault.reason
    except UserError as error:  # a format of the user's failed
        raise UserError(f"{where}: {error}") from error
    if converted.get("responses") and not record.responses:
        return None, NOTHING_LEFT
    # Tables of floats say NaN where a cell is missing; JSON has no word for it.
    record.extra = {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in record.extra.items()
    }
    return record, ""
