"""The record that every stage reads and writes, as JSON lines (plain or .gz) and as Parquet.

One record is a query with its k responses, where each came from, how it ended and what a reward said of it::

    {"id": "…", "query": "text" | [{"role", "content"}, …],
     "responses": ["…", …], "sources": ["diverse-beam/0", "human/chosen", …], "finish": ["stop" | "length", …],
     "scores": [0.7, null, …], "rewards": {"pkg.mod:f": [0.7, null, …], …}}

Only ``query`` is required; unknown columns travel along. Reading and writing stream: what stays in memory is one
record (JSON lines) or one batch (Parquet), and 8 bytes of hash with a line number for each id.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import json
import math
import numbers
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from rrhf.errors import UserError
from rrhf.files import refuse_existing, replacing

Message = dict[str, str]
Query = str | list[Message]
Require = Literal["query", "responses", "scores"]
EmptyResponses = Literal["error", "drop"]

FIELDS = ("id", "query", "responses", "sources", "finish", "scores", "rewards")
FINISH = ("stop", "length")
REQUIRED = ("query", "responses", "scores")  # a stage that needs one needs those before it
CURES = {"responses": "run `rrhf sample` first", "scores": "run `rrhf score` first"}

PARQUET_BATCH = 1000  # rows in memory at once, and in a row group
PARQUET_MARK = b"rrhf"  # field metadata: how a column's cells stand for JSON values


class RowError(UserError):
    """A row that is no record. ``reason`` says why in words that do not depend on the row."""

    def __init__(self, where: str, reason: str, cure: str) -> None:
        super().__init__(f"{where}: {reason}: {cure}")
        self.reason = reason


@dataclass(slots=True)
class Record:
    """A query x with its k responses y_i and their scores r_i.

    ``sources``, ``finish`` and every list in ``rewards`` have k entries; ``scores`` has k, or none where nothing was
    scored yet. A score of None takes part in no pair. Left out, ``sources`` becomes ``provided/0`` …, ``finish``
    ``stop`` and ``id`` the query's hash.
    """

    query: Query
    responses: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    rewards: dict[str, list[float | None]] = field(default_factory=dict)
    id: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = self.id or content_id(self.query)
        self.sources = self.sources or [f"provided/{i}" for i in range(len(self.responses))]
        self.finish = self.finish or ["stop"] * len(self.responses)


def content_id(query: Query) -> str:
    """Return 16 hexadecimal digits that depend on the query alone (BLAKE2b of its text or of its messages' JSON)."""
    text = query if isinstance(query, str) else json.dumps(query, ensure_ascii=False, sort_keys=True)
    kind = b"text\0" if isinstance(query, str) else b"messages\0"
    return hashlib.blake2b(kind + text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def query_text(query: Query) -> str:
    """Return the query as plain text for people to read; messages become ``role: content`` paragraphs."""
    if isinstance(query, str):
        return query
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in query)


# --- one row -----------------------------------------------------------------------------------------------------


def record_from_row(
    row: Any,
    where: str,
    require: Require = "query",
    empty_responses: EmptyResponses = "error",
    counts: Counter[str] | None = None,
) -> Record:
    """Check one row and return its record.

    Args:
        row: the parsed JSON object (or Parquet row).
        where: what an error calls the row's place, such as ``data.jsonl, line 3``.
        require: the last field the stage needs. From ``responses`` on an empty response is an error.
        empty_responses: ``drop`` takes empty responses out, with their scores, whatever ``require`` says.
        counts: counts what was dropped.

    Raises:
        RowError: the row is no valid record, or lacks what ``require`` asks for.
    """
    if not isinstance(row, dict):
        raise RowError(where, f"a row must be a JSON object, not {_kind_name(row)}", 'write {"query": …} on each line')
    query = _query(row, where)
    responses = _texts(row, "responses", None, where) or []
    k = len(responses)
    record = Record(
        query=query,
        responses=responses,
        sources=_texts(row, "sources", k, where) or [],
        finish=_texts(row, "finish", k, where) or [],
        scores=_scores(row.get("scores"), "scores", k, where),
        rewards=_rewards(row.get("rewards"), k, where),
        id=_id(row.get("id"), where),
        extra={name: value for name, value in row.items() if name not in FIELDS},
    )
    for finish in record.finish:
        if finish not in FINISH:
            raise RowError(where, f"finish is {finish!r}", "it must be 'stop' or 'length'")
    for name in REQUIRED[1 : REQUIRED.index(require) + 1]:
        if not getattr(record, name):
            raise RowError(where, f"no {name}", CURES[name])
    if empty_responses == "drop":
        _drop_empty(record, counts)
    elif require != "query":
        for index, response in enumerate(record.responses):
            if not response.strip():
                raise RowError(
                    where,
                    f"response {index} is empty",
                    "take it out, or run `rrhf convert` on the file, which drops empty responses and counts them",
                )
    return record


def _kind_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, numbers.Number) else type(value).__name__)


def _query(row: dict[str, Any], where: str) -> Query:
    query = row.get("query")
    if query is None:
        columns = ", ".join(map(str, row)) or "none"
        raise RowError(
            where,
            f"no query (columns: {columns})",
            "give `query`, or bring another format in with `rrhf convert SRC --format X --output F`",
        )
    if not isinstance(query, (str, list)):
        raise RowError(where, f"query is {_kind_name(query)}", "it must be text or a list of messages")
    if isinstance(query, list):
        for message in query:
            if not isinstance(message, dict) or not all(isinstance(message.get(n), str) for n in ("role", "content")):
                raise RowError(
                    where, "a message of the query lacks role or content", 'write {"role": "user", "content": "…"}'
                )
    texts = [query] if isinstance(query, str) else [message["content"] for message in query]
    if not any(text.strip() for text in texts):
        raise RowError(where, "the query is empty", "fill it in or take the row out")
    return query


def _id(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise RowError(where, f"id is {value!r}", "it must be text, or be left out")
    return str(value)


def _list(value: Any, name: str, k: int | None, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(where, f"{name} is {_kind_name(value)}", "it must be a list with one entry a response")
    if k is not None and len(value) != k:
        raise RowError(where, f"{name} and responses differ in length ({len(value)} and {k})", "give one a response")
    return value


def _texts(row: dict[str, Any], name: str, k: int | None, where: str) -> list[str] | None:
    value = row.get(name)
    if value is None:
        return None
    for index, entry in enumerate(_list(value, name, k, where)):
        if not isinstance(entry, str):
            raise RowError(where, f"{name}[{index}] is {_kind_name(entry)}", "it must be text")
    return list(value)


def _scores(value: Any, name: str, k: int, where: str) -> list[float | None]:
    if value is None:
        return []
    return [
        None if entry is None else _number(entry, f"{name}[{index}]", where)
        for index, entry in enumerate(_list(value, name, k, where))
    ]


def _number(value: Any, name: str, where: str) -> float:
    cure = "a score is a finite number, or null for a response that was not scored"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RowError(where, f"{name} is {_kind_name(value)}", cure)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(where, f"{name} is {'NaN' if math.isnan(number) else 'infinite'}", cure)
    return number


def _rewards(value: Any, k: int, where: str) -> dict[str, list[float | None]]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowError(where, f"rewards is {_kind_name(value)}", 'write {"pkg.module:function": [score, …]}')
    # Parquet gives every row every reward, null where the row has it not.
    return {
        name: _scores(scores, f"rewards {name!r}", k, where) for name, scores in value.items() if scores is not None
    }


def _drop_empty(record: Record, counts: Counter[str] | None) -> None:
    kept = [index for index, response in enumerate(record.responses) if response.strip()]
    dropped = len(record.responses) - len(kept)
    if not dropped:
        return
    if counts is not None:
        counts["empty response dropped"] += dropped
    for name in ("responses", "sources", "finish", "scores"):
        values = getattr(record, name)
        setattr(record, name, [values[index] for index in kept] if values else values)
    record.rewards = {name: [scores[index] for index in kept] for name, scores in record.rewards.items() if kept}


def record_to_row(record: Record) -> dict[str, Any]:
    """Return the record as a JSON object in the fixed order of fields, empty ones left out, unknown columns last."""
    row: dict[str, Any] = {"id": record.id, "query": record.query}
    for name in FIELDS[2:]:
        value = getattr(record, name)
        if value:
            row[name] = value
    row.update((name, value) for name, value in record.extra.items() if name not in FIELDS)
    return row


def record_line(record: Record) -> str:
    """Return the record as one line of JSON, without the newline.

    Raises:
        UserError: it holds NaN, an infinity, a broken character or something JSON has no word for.
    """
    row = record_to_row(record)
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        line.encode("utf-8")  # refuses half a surrogate pair here, with the record's name
    except (ValueError, TypeError) as error:
        column = next((name for name, value in row.items() if not _writable(value)), "?")
        raise UserError(
            f"record {record.id!r}: {column!r} cannot be written as JSON ({error}): mend or drop it"
        ) from error
    return line


def _writable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, TypeError):
        return False
    return True


# --- ids ---------------------------------------------------------------------------------------------------------


class Ids:
    """Makes ids unique within one file and remembers of each an 8-byte hash and the line of its first use."""

    def __init__(self) -> None:
        self._lines: dict[int, int] = {}
        self._repeats: dict[int, int] = {}

    @staticmethod
    def _digest(name: str) -> int:
        return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")

    def first_line(self, name: str) -> int | None:
        """Return the line of the first use of ``name``, None where it is new."""
        return self._lines.get(self._digest(name))

    def claim(self, name: str, line: int) -> str:
        """Return ``name``, or with the first free of the suffixes -2, -3, … where it is taken."""
        digest = self._digest(name)
        if digest not in self._lines:
            self._lines[digest] = line
            return name
        number = self._repeats.get(digest, 1) + 1
        while (other := self._digest(f"{name}-{number}")) in self._lines:
            number += 1
        self._repeats[digest] = number
        self._lines[other] = line
        return f"{name}-{number}"


# --- reading -----------------------------------------------------------------------------------------------------

Row = tuple[Any, str, int]  # the parsed row, what errors call its place, its line or row number


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
                counts["no response left"] += 1
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


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield each line's bytes with its number, blank ones left out, without a byte order mark."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield line, number
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is broken or cut short ({error}): write or fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error


def text_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each line that is not blank, as text, with its number. Raises UserError for a byte that is not UTF-8."""
    for line, number in _lines(path):
        yield _decode(line, f"{path}, line {number}"), number


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(where, f"not UTF-8 (byte {error.start + 1})", "save the file as UTF-8") from error


def _parse(text: str, where: str) -> Any:
    """Return the JSON value of ``text``; refuse what Python reads and JSON has not: NaN and halves of characters."""
    strange: list[str] = []

    def constant(name: str) -> float:
        strange.append(name)
        return float(name)

    try:
        value = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RowError(where, f"not JSON ({reason})", "mend the line, or take it out") from error
    if "\\ud" in text.lower() and not _writable_text(value):
        raise RowError(where, "holds half of a surrogate pair (\\ud800 … \\udfff)", "replace the broken character")
    if strange and not _bad_scores(value):  # the check of scores says which score is NaN
        raise RowError(where, f"{strange[0]} is not JSON", "write null, or a number")
    return value


def _writable_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _bad_scores(value: Any) -> bool:
    """Whether a NaN or an infinity stands in the scores, which have an error of their own."""
    fields = {name: value.get(name) for name in ("scores", "rewards")} if isinstance(value, dict) else {}
    return not _writable(fields)


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
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is broken or cut short ({error}): write or fetch it again") from error
    for number, row in enumerate(rows, 1):
        yield row, f"{path}, row {number}", number


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            marks = {column.name: (column.metadata or {}).get(PARQUET_MARK) for column in file.schema_arrow}
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for cells in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield _row_from_cells(cells, marks), f"{path}, row {number}", number
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({error}): write or fetch it again") from error


def _row_from_cells(cells: dict[str, Any], marks: dict[str, bytes | None]) -> dict[str, Any]:
    row = {}
    for name, cell in cells.items():
        if marks[name] == b"json":
            if cell is not None:
                row[name] = json.loads(cell)
        elif cell is not None or marks[name] != b"absent":
            # NaN is how tables of floats say that a cell is missing; in lists it stays, for the check of scores.
            row[name] = None if isinstance(cell, float) and math.isnan(cell) else plain(cell)
    return row


def plain(value: Any) -> Any:
    """Return ``value`` in JSON's types: dates as ISO text, tuples as lists, anything unknown as its text."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers
        return plain(value.tolist())
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _jsonl_rows,
    ".json": _json_rows,
    ".json.gz": _json_rows,
    ".parquet": _parquet_rows,
}


# --- writing -----------------------------------------------------------------------------------------------------


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


def _write_lines(file: IO[bytes] | gzip.GzipFile, records: Iterable[Record]) -> int:
    count = 0
    for record in records:
        file.write(record_line(record).encode("utf-8") + b"\n")
        count += 1
    return count


def _write_jsonl(path: Path, records: Iterable[Record]) -> int:
    with path.open("wb") as file:
        return _write_lines(file, records)


def _write_jsonl_gz(path: Path, records: Iterable[Record]) -> int:
    # No name and no time in the header: equal records give equal bytes.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        return _write_lines(file, records)


def _write_parquet(path: Path, records: Iterable[Record]) -> int:
    """Write Parquet in two passes, for its schema must stand before the first row and a stream has no second one:

    the rows go to an unnamed file of lines while their types are noted, then from there into row groups.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, _Column] = {"id": _Column("string"), "query": _Column()}
    count = 0
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        for record in records:
            line = record_line(record)
            # Read back, for a tuple is a list and a key a text only after JSON.
            for name, value in json.loads(line).items():
                columns.setdefault(name, _Column()).note(name, value)
            spool.write(line.encode("utf-8") + b"\n")
            count += 1
        spool.seek(0)
        order = [name for name in FIELDS if name in columns] + [name for name in columns if name not in FIELDS]
        schema = pa.schema([columns[name].field(name, count) for name in order])
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for lines in _batches(spool, PARQUET_BATCH):
                rows = [json.loads(line) for line in lines]
                arrays = [
                    pa.array([columns[column.name].cell(row, column.name) for row in rows], column.type)
                    for column in schema
                ]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=PARQUET_BATCH)
    return count


def _batches(lines: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for line in lines:
        batch.append(line)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(slots=True)
class _Column:
    """What a Parquet column holds: a native type where all its values share one, JSON text otherwise."""

    kind: str = "null"
    seen: int = 0
    nulls: int = 0
    rewards: dict[str, None] = field(default_factory=dict)  # the names, in the order they came

    def note(self, name: str, value: Any) -> None:
        """Widen the type by one value."""
        self.seen += 1
        self.nulls += value is None
        if name == "rewards":
            self.kind = "rewards"
            self.rewards.update(dict.fromkeys(value))
        elif name == "scores":
            self.kind = "list:double"
        elif name == "query" and isinstance(value, list):
            exact = all(message.keys() == {"role", "content"} for message in value)
            self.kind = _widen(self.kind, "messages" if exact else "json")
        else:
            self.kind = _widen(self.kind, _kind(value))

    def mark(self, count: int) -> bytes | None:
        """How a null cell is read: as null, as no value, or neither since the cells are JSON."""
        if self.kind == "json" or (self.nulls and self.seen < count):
            return b"json"
        return b"absent" if self.seen < count else None

    def field(self, name: str, count: int) -> Any:
        """Return the pyarrow field of a column of ``count`` rows."""
        import pyarrow as pa

        mark = self.mark(count)
        if mark == b"json":
            self.kind = "json"
        types: dict[str, Callable[[], Any]] = {
            "bool": pa.bool_,
            "int64": pa.int64,
            "double": pa.float64,
            "list:bool": lambda: pa.list_(pa.bool_()),
            "list:int64": lambda: pa.list_(pa.int64()),
            "list:double": lambda: pa.list_(pa.float64()),
            "list:string": lambda: pa.list_(pa.string()),
            "list:null": lambda: pa.list_(pa.string()),
            "messages": lambda: pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
            "rewards": lambda: pa.struct([(reward, pa.list_(pa.float64())) for reward in self.rewards]),
        }
        return pa.field(name, types.get(self.kind, pa.string)(), metadata={PARQUET_MARK: mark} if mark else None)

    def cell(self, row: dict[str, Any], name: str) -> Any:
        """Return what goes into the column for ``row``."""
        if self.kind == "json" and name in row:
            return json.dumps(row[name], ensure_ascii=False)
        return row.get(name)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        kind = "null"
        for entry in value:
            kind = _widen(kind, _kind(entry))
        return f"list:{kind}" if kind in ("null", "bool", "int64", "double", "string") else "json"
    if isinstance(value, int) and not isinstance(value, bool):
        return "int64" if -(2**63) <= value < 2**63 else "json"
    return {type(None): "null", bool: "bool", float: "double", str: "string"}.get(type(value), "json")


def _widen(first: str, second: str) -> str:
    if first == second or second == "null":
        return first
    if first == "null":
        return second
    if {first, second} & {"list:null"} and first.startswith("list:") and second.startswith("list:"):
        return second if first == "list:null" else first
    return "json"


WRITERS: dict[str, Callable[[Path, Iterable[Record]], int]] = {
    ".jsonl": _write_jsonl,
    ".jsonl.gz": _write_jsonl_gz,
    ".parquet": _write_parquet,
}


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
