"""Sources whose answers were paid for: each is kept in a journal at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.journal import Journal
from rrhf.records.checksums import checksum_of_records
from rrhf.records.record import Record, record_from_row, record_line
from rrhf.sampling.sources.source import Answers, Responder


class PaidSource:
    """A server, with a journal of what it has answered.

    Args:
        responder: what is asked.
        tag, settings: see ``Source``.
        folder: where the journals lie, one a part: whoever comes to the part takes the answers up.
    """

    uses_policy_cache = False

    def __init__(self, responder: Responder, tag: str, settings: Mapping[str, Any], folder: Path) -> None:
        self.responder, self.tag, self.folder = responder, tag, folder
        self._settings = settings

    @property
    def settings(self) -> dict[str, Any]:
        """What its responses depend on; of a server that was not told which model, the one that it has."""
        return {**self._settings, "name": self.responder.model}

    def check(self) -> None:
        self.responder.check()

    def check_query(self, record: Record) -> None:
        self.responder.check_query(record)

    def answer(self, records: list[Record], counts: Counter[str]) -> Answers:
        journal = Journal(self.folder, f"{self.tag} {self.responder.model} {checksum_of_records(records)}")
        known = _records_of(journal)
        for i, record in enumerate(records):
            if record.id in known:
                yield i, known[record.id]
        rest = [(i, record) for i, record in enumerate(records) if record.id not in known]
        for j, texts, finish in self.responder.respond([record for _, record in rest]):
            i, record = rest[j]
            extended = record.with_responses(texts, finish, [f"{self.tag}/{n}" for n in range(len(texts))])
            journal.add(record_line(extended))
            yield i, extended

    def close(self) -> None:
        self.responder.close()


def _records_of(journal: Journal) -> dict[str, Record]:
    """Id → the record with its responses."""
    known = {}
    for row in journal.read():
        try:
            record = record_from_row(row, str(journal.path))
        except UserError:  # a torn line that happens to be JSON
            continue
        known[record.id] = record
    return known
