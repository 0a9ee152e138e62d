"""Work on parts in other processes, perhaps on other machines: what a step must be, so that it can travel.

A step travels as what opens it there. What comes back are the records that it could make; those that it could not make
are tried again in ever smaller pieces, a record by itself and at last a response by itself (``Away.apart``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rrhf.records.files import read_records
from rrhf.records.record import Record

# Takes records, and what counts what is worth a line at the end; yields (index, the record with what the step adds)
# once for every record, in any order, each as soon as it is done.
Answer = Callable[[list[Record], Counter[str]], Iterator[tuple[int, Record]]]
Read = Callable[[Collection[int]], Iterator[tuple[int, list[Record]]]]  # numbers of parts → (number, its records)


@dataclass(frozen=True)
class Away:
    """A step that may be done elsewhere.

    Attributes:
        open: makes what answers, with all that it holds (a model). It is pickled, and called where the work is done.
        apart: the record in its smallest pieces, each of which can be answered by itself.
        unite: the record with what the answered pieces hold; a piece that nobody could answer is None.
        settle: what is left to do with a part's records, in order, once all are there; counts what it counts.
    """

    open: Callable[[], Answer]
    apart: Callable[[Record], list[Record]]
    unite: Callable[[Record, Sequence[Record | None]], Record]
    settle: Callable[[list[Record], Counter[str]], list[Record]]


class Pool(Protocol):
    """Processes elsewhere."""

    def make(
        self, step: str, away: Away, numbers: Sequence[int], read: Read
    ) -> Iterator[tuple[int, list[Record], Counter[str]]]:
        """Yield (number, records, counts) of each part as soon as it is made, in any order.

        Args:
            step: its name, for messages.
            numbers: the parts to make.
            read: reads them, on this machine; it can be pickled, and be called as often as is needed.

        Raises:
            UserError: what the user must mend, or more was given up than the pool allows.
        """
        ...


@dataclass(frozen=True)
class Elsewhere:
    """A pool, and those steps of the work, by name, that it does."""

    pool: Pool
    steps: Mapping[str, Away]


def read_parts(files: Mapping[int, Path], numbers: Collection[int]) -> Iterator[tuple[int, list[Record]]]:
    """The records of parts that lie in ``files``; an empty one has none."""
    for number in numbers:
        path = files[number]
        yield number, list(read_records(path)) if path.stat().st_size else []
