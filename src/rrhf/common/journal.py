"""A journal of what was paid for: each answer is on disk as soon as it is there, and is never asked for twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rrhf.common.files import append_line


class Journal:
    """JSON objects, one a line with its checksum, in a file whose name tells what they depend on.

    Args:
        folder: where it lies; made when the first answer comes.
        depends_on: a text, or the digest of one, that changes with everything the answers depend on: another journal.
    """

    def __init__(self, folder: Path, depends_on: str) -> None:
        digest = hashlib.sha256(depends_on.encode()).hexdigest()
        self.path = folder / f"journal-{digest[:32]}.jsonl"

    def read(self) -> Iterator[dict[str, Any]]:
        """What was kept, in order, without lines that a killed process was writing or the disk has changed."""
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines():
            text, marked, checksum = line.rpartition(b"\t")  # no JSON of ours holds a tab
            if marked and _checksum(text) != checksum:
                continue
            try:
                entry = json.loads(text or line)  # lines of older journals have no checksum
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry

    def add(self, entry: Mapping[str, Any] | str) -> None:
        """Append an answer, given as an object or as its line of JSON."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
        append_line(self.path, f"{text}\t{_checksum(text.encode()).decode()}")


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()
