"""A file of human or earlier responses as a source."""

from __future__ import annotations

import json
import re
import sqlite3
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

from rrhf.common.errors import UserError
from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import read_records
from rrhf.records.record import Query, Record, content_id, record_from_row, record_line
from rrhf.records.sources import JOIN
from rrhf.sampling.sources.source import Answers

PROVIDED = re.compile(rf"(?<![^{JOIN}])provided/(\d+)(?![^{JOIN}])")  # the tag of a response that has none of its own


class ResponseFile:
    """A file of human or earlier responses: a record gets those of all rows with its query. It is indexed on disk.

    Ids are not asked: another file may have given them to other queries, and rows of one query differ in theirs.
    """

    uses_policy_cache = False

    def __init__(self, path: Path, tag: str) -> None:
        self.path, self.tag = path, tag
        self.settings = {"file": str(path), "sha256": checksum_of_file(path), "tag": tag}
        self.store: sqlite3.Connection | None = None
        self.joins = False  # whether a query that was checked has responses here

    def check(self) -> None:
        """Read the file once; its faults show before any long work."""
        self.folder = tempfile.TemporaryDirectory()
        rows = ((content_id(r.query), record_line(r)) for r in read_records(self.path, require="responses"))
        try:
            self.store = sqlite3.connect(Path(self.folder.name) / "index.sqlite")
            self.store.execute("CREATE TABLE responses (query TEXT, line TEXT)")
            self.store.executemany("INSERT INTO responses VALUES (?, ?)", rows)
            self.store.execute("CREATE INDEX by_query ON responses (query)")
        except sqlite3.Error as error:
            folder = Path(self.folder.name).parent
            raise UserError(
                f"{folder}: cannot hold the index of {self.path} ({error}): free space there, or name another folder "
                "in the environment variable TMPDIR"
            ) from error

    def check_query(self, record: Record) -> None:
        self.joins = self.joins or bool(self._rows(record.query))

    def refuse_strangers(self, data: Path) -> None:
        """Refuse ``data``, whose queries were all checked, where none of them has a response here.

        Raises:
            UserError: that is so.
        """
        if not self.joins:
            raise UserError(
                f"{self.path}: no query of {data} has a response in it: queries must be the same in both files, to the "
                "letter, and either texts or messages in both"
            )

    def answer(self, records: list[Record], counts: Counter[str]) -> Answers:
        if self.store is None:
            self.check()
        for i, record in enumerate(records):
            rows = self._rows(record.query)
            counts[f"queries {'joined with responses of' if rows else 'without a response in'} {self.path}"] += 1
            before = 0  # each row counts its responses from 0
            for row in rows:
                tags = [PROVIDED.sub(partial(self._named, before), tag) for tag in row.sources]
                record = record.with_responses(row.responses, row.finish, tags, row)
                before += 1 + max((int(n) for tag in row.sources for n in PROVIDED.findall(tag)), default=-1)
            yield i, record

    def _named(self, before: int, provided: re.Match[str]) -> str:
        return f"{self.tag}/{before + int(provided[1])}"

    def _rows(self, query: Query) -> list[Record]:
        assert self.store is not None
        found = self.store.execute("SELECT line FROM responses WHERE query = ? ORDER BY rowid", (content_id(query),))
        return [row for (line,) in found if (row := record_from_row(json.loads(line), str(self.path))).query == query]

    def close(self) -> None:
        if self.store is not None:
            self.store.close()
            self.store = None
            self.folder.cleanup()
