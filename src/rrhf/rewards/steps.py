"""What scoring does with a part of the data: the steps that ``score_file`` takes it through."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rrhf.common.journal import Journal
from rrhf.records.checksums import checksum_of_records
from rrhf.records.parts_folder import Finish, Work
from rrhf.records.record import Record
from rrhf.rewards.combination import Combination
from rrhf.rewards.kind import Scorer
from rrhf.rewards.logprob import LogprobModel, fill_sums
from rrhf.rewards.normalise import data_moments
from rrhf.rewards.scoring import Rewards

SORTED_TOGETHER = 64  # records whose responses are sorted by length into forward passes
SLOW = 1.0  # seconds of a call whose values are kept at once

Holder = LogprobModel | Scorer  # what may hold a model or a server


def release(holders: Collection[Holder], kept: Collection[Holder] = ()) -> None:
    """Close all ``holders`` but those ``kept``: one model in memory at a time."""
    for holder in holders:
        if not any(holder is other for other in kept):
            getattr(holder, "close", lambda: None)()


def sums_work(name: str, model: LogprobModel, holders: Collection[Holder], journals: Path) -> Work:
    """Fills the records' ``rewards[name]`` with the sums of ``model``, kept as ``rewards_work`` keeps values."""

    def work(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        release(holders, [model])
        kept = _Kept(journals, block, [name])
        for start in range(0, len(block), SORTED_TOGETHER):
            batch = block[start : start + SORTED_TOGETHER]
            yield from kept.take(start, batch) or kept.add(start, partial(fill_sums, batch, name, model))
            done(len(batch))

    return work


def rewards_work(
    rewards: Rewards, names: Sequence[str], holders: Collection[Holder], journals: Path, combine: bool
) -> Work:
    """Asks the named rewards, and makes the scores of all where ``combine`` says so.

    Values of calls that took long are kept in a journal at once: an error, or the end of the process, in the middle of
    a part does not lose them.
    """

    def work(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        release(holders, [rewards.scorers[name] for name in names])
        kept = _Kept(journals, block, names)
        for start in range(0, len(block), rewards.batch_size):
            batch = block[start : start + rewards.batch_size]
            judged = kept.take(start, batch) or kept.add(start, partial(rewards.judge, batch, names))
            for record in judged:
                yield rewards.combination.score(record) if combine else record
                done(1)

    return work


class _Kept:
    """The values of slow calls for one part, by the place of the call's first record in it."""

    def __init__(self, folder: Path, block: list[Record], names: Sequence[str]) -> None:
        self.folder, self.block, self.names = folder, block, names
        self.journal: Journal | None = None
        self.entries: dict[int, Any] = {}
        if any(folder.glob("journal-*")):
            self.entries = {entry["start"]: entry["values"] for entry in self._opened().read() if "values" in entry}

    def _opened(self) -> Journal:
        if self.journal is None:
            self.journal = Journal(self.folder, " ".join(["slow", *self.names, checksum_of_records(self.block)]))
        return self.journal

    def take(self, start: int, batch: list[Record]) -> list[Record] | None:
        """The records with the values that were kept; None where none were."""
        values = self.entries.get(start)
        if values is None:
            return None
        return [with_values(record, dict(zip(self.names, own))) for record, own in zip(batch, values, strict=True)]

    def add(self, start: int, judge: Callable[[], Iterable[Record]]) -> list[Record]:
        """What ``judge`` gives, kept where it took long."""
        began = time.monotonic()
        judged = list(judge())
        if time.monotonic() - began >= SLOW:
            values = [[record.rewards.get(name) for name in self.names] for record in judged]
            self._opened().add({"start": start, "values": values})
        return judged


def with_values(record: Record, values: dict[str, list[float | None] | None]) -> Record:
    """A record with the values of rewards added; those that are None are left out."""
    return replace(record, rewards={**record.rewards, **{n: v for n, v in values.items() if v is not None}})


def combine_all(combination: Combination) -> Finish:
    """Makes the scores of rewards that are normalised over the data: their moments first, then every record."""

    def finish(results: Callable[[], Iterator[Record]]) -> Iterator[Record]:
        moments = data_moments(results(), combination.over_the_data)
        for record in results():
            yield combination.score(record, moments)

    return finish
