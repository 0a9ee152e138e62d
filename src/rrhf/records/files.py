"""Files of records: JSON lines (plain or .gz), JSON and Parquet, read as streams and written whole or not at all.

What stays in memory is one record (JSON lines) or one batch (Parquet), and 8 bytes of hash with 8 of a line number for
each id.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from rrhf.common.errors import UserError
from rrhf.common.files import refuse_existing, replacing
from rrhf.records.ids import Ids
from rrhf.records.parquet import read_parquet, write_parquet
from rrhf.records.record import (
    REQUIRED,
    EmptyResponses,
    Record,
    Require,
    Row,
    RowError,
    record_from_row,
    record_line,
    writable,
)

NOTHING_LEFT = "no response left"  # why a record was dropped


def read_records(
    path: str | Path,
    require: Require = "query",
    empty_responses: EmptyResponses = "error",
    counts: Counter[str] | None = None,
) -> Iterator[Record]:
    """Read the records of a .jsonl, .jsonl.gz, .json or .parquet file, one after another.

    A missing or repeated content id gets a suffix (-2, -3, …); an id given twice is an error. With
    ``empty_responses="drop"`` empty responses are taken out, and records that keep none, and both are counted.

    Args:
        path: the file.
        require: the last field the stage needs: ``query``, ``responses`` or ``scores``.
        empty_responses: ``error`` or ``drop``.
        counts: counts what was dropped, by reason.

    Raises:
        UserError: at once where the file is missing or of an unknown kind; while reading for a bad row.
    """
    if require not in REQUIRED:
        raise ValueError(f"require is {require!r}, not one of {REQUIRED}")
    return _read_records(Path(path), read_rows(path), require, empty_responses, counts)


def _read_records(
    path: Path, rows: Iterator[Row], require: Require, empty_responses: EmptyResponses, counts: Counter[str] | None
) -> Iterator[Record]:
    ids = Ids()
    empty = True
    for row, where, line in rows:
        empty = False
        record = record_from_row(row, where, require, empty_responses, counts)
        if row.get("id") is None:
            record.id = ids.claim(record.id, line)
        elif (first := ids.first_line(record.id)) is not None:
            unit = where.rpartition(", ")[2].split()[0]
            raise RowError(
                where,
                f"id {record.id!r} is that of {unit} {first} already",
                "make ids unique, or leave them out everywhere and let the queries name the records",
            )
        else:
            ids.claim(record.id, line)
        if row.get("responses") and not record.responses:
            if counts is not None:
                counts[NOTHING_LEFT] += 1
            continue
        yield record
    if empty:
        raise UserError(f"{path}: the file holds no records: check that the command that wrote it finished")


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield each row of a .jsonl, .jsonl.gz, .json or .parquet file as (row, what errors call its place, number).

    Raises:
        UserError: at once where the file is missing or of an unknown kind; while reading where it is broken.
    """
    path = Path(path)
    reader = READERS[file_suffix(path, READERS)]
    require_file(path)
    return reader(path)


def file_suffix(path: str | Path, known: Iterable[str]) -> str:
    """Return which of the ``known`` suffixes ``path`` has. Raises UserError, listing them, where it has none."""
    name = Path(path).name.lower()
    known = list(known)
    for suffix in known:
        if name.endswith(suffix):
            return suffix
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder: name the file in it; known: {', '.join(known)}")
    raise UserError(f"{path}: unknown suffix {Path(path).suffix!r}: known: {', '.join(known)}")


def require_file(path: Path) -> None:
    """Raise UserError where ``path`` is no file, and suggest one beside it with a name like it."""
    if path.is_file():
        return
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name the file in it")
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    cure = f"did you mean {path.parent / close[0]}?" if close else "check the name"
    raise UserError(f"{path}: no such file: {cure}")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Open a file of bytes, unpacked where it is a .gz; raise UserError where it cannot be read or unpacked."""
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is broken or cut short ({error}): write or fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield each line's bytes with its number, blank ones left out, without a byte order mark."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield line, number


def text_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each line that is not blank, as text, with its number. Raises UserError for a byte that is not UTF-8."""
    for line, number in _lines(path):
        yield _decode(line, f"{path}, line {number}"), number


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(where, f"not UTF-8 (byte {error.start + 1})", "save the file as UTF-8") from error


class _ConstantError(Exception):
    """A NaN or an infinity stands in a line."""


def _refuse_constant(name: str) -> float:
    raise _ConstantError(name)


STRICT = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse(text: str, where: str) -> Any:
    """Return the JSON value of ``text``; refuse what Python reads but JSON forbids: NaN and halves of characters."""
    constants: list[str] = []  # NaN, Infinity, -Infinity

    def constant(name: str) -> float:
        constants.append(name)
        return float(name)

    try:
        try:
            value = STRICT.decode(text)  # a decoder made once is twice as fast
        except _ConstantError:
            value = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RowError(where, f"not JSON ({reason})", "mend the line, or take it out") from error
    if "\\ud" in text.lower() and not writable(value, allow_nan=True):
        raise RowError(where, "holds half of a surrogate pair (\\ud800 … \\udfff)", "replace the broken character")
    if constants and not _bad_scores(value):  # the check of scores says which score is NaN
        raise RowError(where, f"{constants[0]} is not JSON", "write null, or a number")
    return value


def _bad_scores(value: Any) -> bool:
    """Whether a NaN or an infinity stands in the scores, which have an error of their own."""
    fields = {name: value.get(name) for name in ("scores", "rewards")} if isinstance(value, dict) else {}
    return not writable(fields)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for text, number in text_lines(path):
        where = f"{path}, line {number}"
        yield _parse(text, where), where, number


def _json_rows(path: Path) -> Iterator[Row]:
    """A .json file is one list of rows, read whole, or lines as the released code writes them."""
    first = next(_lines(path), (b"", 0))[0]
    if not first.lstrip().startswith(b"["):
        yield from _jsonl_rows(path)
        return
    try:
        with _open(path) as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}): mend it, or use one row a line"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists
        raise UserError(f"{path}: not JSON ({error}): mend it, or use one row a line") from error
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if not writable(row) and not (writable(row, allow_nan=True) and _bad_scores(row)):
            raise RowError(where, "holds NaN, an infinity or half of a surrogate pair", "write null, or mend the text")
        yield row, where, number


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _jsonl_rows,
    ".json": _json_rows,
    ".json.gz": _json_rows,
    ".parquet": read_parquet,
}


def write_records(path: str | Path, records: Iterable[Record], overwrite: bool = False) -> int:
    """Write the records to a .jsonl, .jsonl.gz or .parquet file, whole or not at all; return how many.

    The same records give the same bytes. Where anything fails, also in ``records`` itself, what stood at ``path``
    stays.

    Raises:
        UserError: the file exists and ``overwrite`` is false, its suffix is unknown, a record holds what JSON has no
            word for, or the disk is full.
    """
    path = Path(path)
    writer = WRITERS[file_suffix(path, WRITERS)]
    refuse_existing(path, overwrite)
    with replacing(path) as temporary:
        return writer(temporary, records)


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]], overwrite: bool = False) -> int:
    """Write rows that are no records of ours to a .jsonl or .jsonl.gz file, whole or not at all; return how many.

    Raises:
        UserError: the file exists and ``overwrite`` is false, its suffix is unknown, or the disk is full.
    """
    path = Path(path)
    writer = LINE_WRITERS[file_suffix(path, LINE_WRITERS)]
    refuse_existing(path, overwrite)
    with replacing(path) as temporary:
        return writer(temporary, (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows))


def _write_lines(file: IO[bytes] | gzip.GzipFile, lines: Iterable[str]) -> int:
    count = 0
    for line in lines:
        file.write(line.encode("utf-8") + b"\n")
        count += 1
    return count


def _write_jsonl(path: Path, lines: Iterable[str]) -> int:
    with path.open("wb") as file:
        return _write_lines(file, lines)


def _write_jsonl_gz(path: Path, lines: Iterable[str]) -> int:
    # No name and no time in the header: equal lines give equal bytes.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        return _write_lines(file, lines)


LINE_WRITERS: dict[str, Callable[[Path, Iterable[str]], int]] = {".jsonl": _write_jsonl, ".jsonl.gz": _write_jsonl_gz}


def _of_lines(writer: Callable[[Path, Iterable[str]], int]) -> Callable[[Path, Iterable[Record]], int]:
    return lambda path, records: writer(path, map(record_line, records))


WRITERS: dict[str, Callable[[Path, Iterable[Record]], int]] = {
    **{suffix: _of_lines(writer) for suffix, writer in LINE_WRITERS.items()},
    ".parquet": write_parquet,
}


def join_records(path: str | Path, parts: Iterable[Path], overwrite: bool = False) -> None:
    """Write the records of ``parts``, .jsonl files that ``write_records`` or ``record_line`` made, one after another.

    Where ``path`` holds lines too they are copied as they are. Raises as ``write_records`` does.
    """
    path = Path(path)
    suffix = file_suffix(path, WRITERS)
    if not suffix.startswith(".jsonl"):
        filled = (part for part in parts if part.stat().st_size)
        write_records(path, chain.from_iterable(map(read_records, filled)), overwrite)
        return
    refuse_existing(path, overwrite)
    with replacing(path) as temporary, temporary.open("wb") as raw, contextlib.ExitStack() as stack:
        packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if suffix.endswith(".gz") else None
        file = stack.enter_context(packed) if packed else raw
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)


def count_records(path: str | Path) -> int:
    """Return how many rows a record file has, for a progress bar's total, without parsing them where that can be."""
    path = Path(path)
    suffix = file_suffix(path, READERS)
    require_file(path)
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        with contextlib.suppress(OSError, ValueError):  # a broken file is the reader's to report
            return int(pq.ParquetFile(path).metadata.num_rows)
        return 0
    return sum(1 for _ in (_lines(path) if suffix.startswith(".jsonl") else read_rows(path)))
