"""Sources whose answers were paid for: servers and vLLM, with a journal."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.files import append_line
from rrhf.records.checksums import checksum_of_records
from rrhf.records.record import Record, record_from_row, record_line
from rrhf.sampling.sources.source import Answers


@dataclass(frozen=True)
class RemoteSettings:
    """What endpoints among the sources may cost."""

    concurrency: int = field(default=8, metadata={"help": "requests to a server at the same time"})
    timeout: float = field(default=300.0, metadata={"help": "seconds for one request"})
    max_retries: int = field(default=8, metadata={"help": "tries after one that failed"})
    max_requests: int | None = field(
        default=None, metadata={"help": "budget: most requests to a server, by all processes together"}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "budget: most tokens of a server, by all processes together"}
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "the environment variable that holds the server's key"}
    )


class Remote:
    """A server, or vLLM in this process. What it has answered is kept in a journal at once, since it was paid for.

    Args:
        responder: has ``check``, ``check_query`` and ``respond``, as ``Endpoint`` has.
        folder: where the journals lie, one a part: whoever comes to the part takes the answers up.
    """

    def __init__(self, responder: Any, tag: str, settings: dict[str, Any], folder: Path) -> None:
        self.responder, self.tag, self.settings, self.folder = responder, tag, settings, folder

    def check(self) -> None:
        self.responder.check()

    def check_query(self, record: Record) -> None:
        self.responder.check_query(record)

    def answer(self, records: list[Record], counts: Counter[str]) -> Answers:
        digest = hashlib.sha256(f"{self.tag} {checksum_of_records(records)}".encode()).hexdigest()
        journal = self.folder / f"journal-{digest[:32]}.jsonl"
        known = self._known(journal)
        for i, record in enumerate(records):
            if record.id in known:
                yield i, known[record.id]
        rest = [(i, record) for i, record in enumerate(records) if record.id not in known]
        self.folder.mkdir(parents=True, exist_ok=True)
        for j, texts, finish in self.responder.respond([record for _, record in rest]):
            i, record = rest[j]
            extended = record.with_responses(texts, finish, [f"{self.tag}/{n}" for n in range(len(texts))])
            append_line(journal, record_line(extended))
            yield i, extended

    def _known(self, journal: Path) -> dict[str, Record]:
        known = {}
        if journal.exists():
            for line in journal.read_bytes().splitlines():
                try:
                    record = record_from_row(json.loads(line), str(journal))
                except (ValueError, UserError):  # the line a killed process was writing
                    continue
                known[record.id] = record
        return known

    def close(self) -> None:
        if hasattr(self.responder, "close"):
            self.responder.close()
