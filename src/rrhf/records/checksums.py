"""Checksums that tell whether a file, or some records, are still those that something was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from rrhf.records.record import Record, record_line


def checksum_of_records(records: Iterable[Record]) -> str:
    """SHA-256 of all that the records hold."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(record_line(record).encode() + b"\n")
    return digest.hexdigest()


def checksum_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
