"""A file of human or earlier responses as a source."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path

from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import read_records
from rrhf.records.record import Record, record_from_row, record_line
from rrhf.sampling.sources.source import Answers


class ResponseFile:
    """A file of human or earlier responses, joined to the records by id, else by query; it is indexed on disk."""

    uses_policy_cache = False

    def __init__(self, path: Path, tag: str) -> None:
        self.path, self.tag = path, tag
        self.settings = {"file": str(path), "sha256": checksum_of_file(path), "tag": tag}
        self.store: sqlite3.Connection | None = None

    def check(self) -> None:
        """Read the file once; its faults show before any long work."""
        self.folder = tempfile.TemporaryDirectory()
        self.store = sqlite3.connect(Path(self.folder.name) / "index.sqlite")
        self.store.execute("CREATE TABLE responses (id TEXT, query TEXT, line TEXT)")
        rows = ((r.id, json.dumps(r.query), record_line(r)) for r in read_records(self.path, require="responses"))
        self.store.executemany("INSERT INTO responses VALUES (?, ?, ?)", rows)
        self.store.execute("CREATE INDEX by_id ON responses (id)")
        self.store.execute("CREATE INDEX by_query ON responses (query)")

    def check_query(self, record: Record) -> None:
        pass

    def answer(self, records: list[Record], counts: Counter[str]) -> Answers:
        if self.store is None:
            self.check()
        for i, record in enumerate(records):
            line = self._line("id", record.id) or self._line("query", json.dumps(record.query))
            if line is None:
                yield i, record
                continue
            counts[f"queries joined with responses of {self.path}"] += 1
            other = record_from_row(json.loads(line), str(self.path))
            tags = [t.replace("provided", self.tag, 1) if t.startswith("provided/") else t for t in other.sources]
            yield i, record.with_responses(other.responses, other.finish, tags, other)

    def _line(self, column: str, value: str) -> str | None:
        assert self.store is not None
        row = self.store.execute(f"SELECT line FROM responses WHERE {column} = ?", (value,)).fetchone()  # nosec B608
        return None if row is None else str(row[0])

    def close(self) -> None:
        if self.store is not None:
            self.store.close()
            self.store = None
            self.folder.cleanup()
