"""Records as token ids, of which only the last few are in memory: a million take no more of it than ten thousand.

Full blocks of records are written to an unnamed file of Arrow's streaming format's batches and read from it by mapping,
so the system keeps in memory what is read often and gives up the rest.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rrhf.models.tokenization import EncodedRecord

BLOCK = 4096  # records in memory before they go to the file
MAPPED = 8192  # blocks; the system allows a process 65,530 maps


@dataclass(frozen=True)
class TrainingRecord(EncodedRecord):
    """A record with the responses that its loss reads.

    ``padded_length``: of the longest row with all responses. ``reference_sums``: Σ_t log ρ(y_t | …) of each response.
    ``old_token_logprobs``, ``reference_token_logprobs``: log P(y_t | …) of each response's tokens, under the policy
    that drew it and under ρ. None where the records bring none.
    """

    padded_length: int
    reference_sums: Sequence[float] | None = None
    old_token_logprobs: Sequence[Sequence[float]] | None = None
    reference_token_logprobs: Sequence[Sequence[float]] | None = None


class StoredRecords(Sequence[TrainingRecord]):
    """Training records in the order they were appended; one that is set anew stays in memory.

    Args:
        block: records of a block.
    """

    def __init__(self, block: int = BLOCK) -> None:
        self.block = block
        self._last: list[TrainingRecord] = []
        self._changed: dict[int, TrainingRecord] = {}
        self._file: Any = None
        self._places: list[tuple[int, int]] = []  # of each block in the file: where it begins, and its bytes
        self._mapped: dict[int, Any] = {}  # blocks that were read; they take addresses, no memory of this process

    def append(self, record: TrainingRecord) -> None:
        self._last.append(record)
        if len(self._last) == self.block:
            self._write()

    def __len__(self) -> int:
        return len(self._places) * self.block + len(self._last)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index in self._changed:
            return self._changed[index]
        number, place = divmod(index, self.block)
        if number == len(self._places):
            return self._last[place]
        return _record(self._read(number), place)

    def __setitem__(self, index: int, record: TrainingRecord) -> None:
        self._changed[range(len(self))[index]] = record

    def __iter__(self) -> Iterator[TrainingRecord]:
        return (self[index] for index in range(len(self)))

    def _write(self) -> None:
        import pyarrow as pa

        schema = _schema()
        columns = [pa.array([getattr(r, f.name) for r in self._last], f.type) for f in schema]
        data = pa.RecordBatch.from_arrays(columns, schema=schema).serialize()
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="rrhf-records-")  # noqa: SIM115
        self._file.seek(0, 2)
        self._places.append((self._file.tell(), len(data)))
        self._file.write(data)
        self._file.flush()
        self._last.clear()

    def _read(self, number: int) -> Any:
        """A block of the file, mapped."""
        import mmap

        import pyarrow as pa

        if number in self._mapped:
            return self._mapped[number]
        while len(self._mapped) >= MAPPED:
            del self._mapped[next(iter(self._mapped))]
        start, size = self._places[number]
        before = start % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._file.fileno(), before + size, access=mmap.ACCESS_READ, offset=start - before)
        self._mapped[number] = pa.ipc.read_record_batch(pa.py_buffer(mapped).slice(before, size), _schema())
        return self._mapped[number]

    def __reduce__(self) -> Any:
        return _restored, (self.block, list(self))  # for a process that is started and not forked


def _restored(block: int, records: list[TrainingRecord]) -> StoredRecords:
    stored = StoredRecords(block)
    for record in records:
        stored.append(record)
    return stored


@lru_cache(maxsize=1)
def _schema() -> Any:
    import pyarrow as pa

    ids, numbers = pa.list_(pa.int32()), pa.list_(pa.float64())
    return pa.schema(
        {
            "id": pa.string(),
            "query": ids,
            "responses": pa.list_(ids),
            "scores": numbers,
            "padded_length": pa.int64(),
            "reference_sums": numbers,
            "old_token_logprobs": pa.list_(numbers),
            "reference_token_logprobs": pa.list_(numbers),
        }
    )


def _record(block: Any, place: int) -> TrainingRecord:
    values = {name: block.column(name)[place] for name in block.schema.names}
    old, theirs = (
        None if values[name].as_py() is None else [array("d", row) for row in values[name].as_py()]
        for name in ("old_token_logprobs", "reference_token_logprobs")
    )
    return TrainingRecord(
        values["id"].as_py(),
        _ids(values["query"].values),
        [_ids(row.values) for row in values["responses"]],
        values["scores"].as_py(),
        values["padded_length"].as_py(),
        values["reference_sums"].as_py(),
        old,
        theirs,
    )


def _ids(values: Any) -> array[int]:
    found: array[int] = array("i")
    found.frombytes(values.to_numpy().tobytes())
    return found
