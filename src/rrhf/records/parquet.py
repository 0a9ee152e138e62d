"""Records as Parquet: native columns where a column's values share one type, JSON text otherwise."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.records.record import FIELDS, Record, Row, plain, record_line

PARQUET_BATCH = 1000  # rows in memory at once, and in a row group
PARQUET_MARK = b"rrhf"  # field metadata: how a column's cells stand for JSON values


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield each row of a Parquet file, a batch of ``PARQUET_BATCH`` in memory at a time.

    Raises:
        UserError: the file is broken.
    """
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
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError) as error:
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


def write_parquet(path: Path, records: Iterable[Record]) -> int:
    """Write the records as Parquet; return how many.

    The schema must be known before the first row is written, and the records can be read only once. So they go to an
    unnamed file of lines first, while the types of their columns are noted, and from there into row groups.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, _Column] = {"id": _Column("string"), "query": _Column()}
    count = 0
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        for record in records:
            line = record_line(record)
            # Read back: only JSON makes lists of tuples and texts of keys.
            for name, value in json.loads(line).items():
                columns.setdefault(name, _Column()).note(name, value)
            spool.write(line.encode("utf-8") + b"\n")
            count += 1
        spool.seek(0)
        order = [name for name in FIELDS if name in columns] + [name for name in columns if name not in FIELDS]
        schema = pa.schema([columns[name].field(name, count) for name in order])
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            while lines := list(islice(spool, PARQUET_BATCH)):
                rows = [json.loads(line) for line in lines]
                arrays = [
                    pa.array([columns[column.name].cell(row, column.name) for row in rows], column.type)
                    for column in schema
                ]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=PARQUET_BATCH)
    return count


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
