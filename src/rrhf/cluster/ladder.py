"""What is left to do of a step's parts: those that failed are tried again, in ever smaller pieces.

    part    →  record           →  piece                             →  given up
    (twice)    (by itself, twice)  (a response by itself, in a        null, and counted
                                    process of its own, twice)

What came back of a part that failed is kept: only what is missing goes down. A record is given up only when its
pieces, each in a process of its own, failed again and again; how many may be is limited.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rrhf.common.errors import UserError
from rrhf.records.elsewhere import Away, Read
from rrhf.records.record import Record

log = logging.getLogger("rrhf")

TRIES = 2  # on each rung
Made = tuple[int, list[Record], "Counter[str]"]


class Unit(NamedTuple):
    """What is sent at once: a part, the record in a place of it, or a piece of that (``piece``)."""

    number: int
    place: int = -1
    piece: int = -1

    @property
    def rung(self) -> int:
        return (self.place >= 0) + (self.piece >= 0)


@dataclass
class Outcome:
    """What came back of a unit: the records made, by their place in it, and of the others why not."""

    made: dict[int, Record]
    failed: dict[int, str]
    counts: Counter[str]


@dataclass
class _Broken:
    """A part that did not come back whole."""

    block: list[Record]  # as it was
    made: dict[int, Record]
    counts: Counter[str]
    pieces: dict[int, dict[int, Record | None]] = field(default_factory=dict)  # record → its pieces, None: given up


class Ladder:
    """The state of one step's work.

    Args:
        step: its name, for messages.
        numbers: the parts to make.
        read: reads them.
        most: how many pieces may be given up.
    """

    def __init__(self, step: str, away: Away, numbers: Sequence[int], read: Read, most: int) -> None:
        self.step, self.away, self.read, self.most = step, away, read, most
        self.tries: dict[Unit, int] = {Unit(number): 0 for number in numbers}  # what is to do → how often it was tried
        self.why: dict[Unit, str] = {}
        self.broken: dict[int, _Broken] = {}
        self.partly: dict[int, tuple[dict[int, Record], Counter[str]]] = {}  # parts of which something came back
        self.given_up = 0

    def next_pass(self) -> list[Unit]:
        """The units of the highest rung there are, in order; none where all is done."""
        rung = min((unit.rung for unit in self.tries), default=0)
        return sorted(unit for unit in self.tries if unit.rung == rung)

    def records(self, unit: Unit) -> list[Record]:
        """What a unit below a part is made of."""
        record = self.broken[unit.number].block[unit.place]
        return [record if unit.piece < 0 else self.away.apart(record)[unit.piece]]

    def took(self, unit: Unit, outcome: Outcome) -> Iterator[Made]:
        """Take in what came back of a unit of this pass; yields a part that is complete with it."""
        if unit not in self.tries:  # it came twice
            return
        if outcome.failed:
            self.why[unit] = next(iter(outcome.failed.values()))
            if unit.rung == 0:
                self.partly[unit.number] = outcome.made, outcome.counts
            return
        del self.tries[unit]
        if unit.rung == 0:
            records = [outcome.made[i] for i in range(len(outcome.made))]
            yield unit.number, self.away.settle(records, outcome.counts), outcome.counts
            return
        part = self.broken[unit.number]
        part.counts.update(outcome.counts)
        if unit.piece < 0:
            part.made[unit.place] = outcome.made[0]
        else:
            part.pieces[unit.place][unit.piece] = outcome.made[0]
        yield from self._completed(unit)

    def missed(self, units: Sequence[Unit]) -> Iterator[Made]:
        """Note that a pass is over: what did not come is tried again, or goes down; yields parts that are complete."""
        down = []
        for unit in units:
            if unit in self.tries:
                self.tries[unit] += 1
                if self.tries[unit] >= TRIES or unit.number in self.partly:
                    down.append(unit)
        for number, block in self.read([unit.number for unit in down if unit.rung == 0]):
            made, counts = self.partly.pop(number, ({}, Counter()))
            self.broken[number] = _Broken(block, made, counts)
        for unit in down:
            del self.tries[unit]
            part = self.broken[unit.number]
            if unit.rung == 0:
                missing = [index for index in range(len(part.block)) if index not in part.made]
                log.warning(f"{self.step}: part {unit.number} failed: {self._reason(unit)}; {len(missing)} of its "
                            f"{len(part.block)} records are tried one by one")  # fmt: skip
                self.tries |= {Unit(unit.number, index): 0 for index in missing}
            elif unit.rung == 1:
                pieces = range(len(self.away.apart(part.block[unit.place])))
                part.pieces[unit.place] = {}
                self.tries |= {Unit(unit.number, unit.place, piece): 0 for piece in pieces}
                if not pieces:  # nothing to answer
                    yield from self._completed(unit)
            else:
                self._give_up(unit, part)
                yield from self._completed(unit)

    def _reason(self, unit: Unit) -> str:
        return self.why.get(unit, "the process at work on it died")

    def _give_up(self, unit: Unit, part: _Broken) -> None:
        record = part.block[unit.place]
        what = (
            f"record {record.id!r}, response {unit.piece}"
            if len(self.away.apart(record)) > 1
            else f"record {record.id!r}"
        )
        self.given_up += 1
        if self.given_up > self.most:
            raise UserError(
                f"{self.step}: {what} failed again and again, the last time by itself: {self._reason(unit)}. No more "
                f"than --cluster_failures {self.most} may be left out: mend it, or give a larger number, and run the "
                "same command again: what is finished is kept"
            )
        log.warning(f"{self.step}: {what} is given up: {self._reason(unit)}")
        part.counts[f"failed again and again and left out ({self.step})"] += 1
        part.pieces[unit.place][unit.piece] = None

    def _completed(self, unit: Unit) -> Iterator[Made]:
        """The part of a unit, where all its records are there."""
        part = self.broken[unit.number]
        pieces = part.pieces.get(unit.place)
        record = part.block[unit.place]
        if pieces is not None and unit.place not in part.made and len(pieces) == len(self.away.apart(record)):
            part.made[unit.place] = self.away.unite(record, [pieces[i] for i in range(len(pieces))])
        if len(part.made) == len(part.block):
            del self.broken[unit.number]
            records = [part.made[i] for i in range(len(part.block))]
            yield unit.number, self.away.settle(records, part.counts), part.counts
