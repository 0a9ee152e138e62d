"""Checksums that tell whether a file, or some records, are still those that something was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from rrhf.common.files import checksum_of_file
from rrhf.records.record import Record, record_line

__all__ = ["checksum_of_file", "checksum_of_records"]


def checksum_of_records(records: Iterable[Record]) -> str:
    """SHA-256 of all that the records hold."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(record_line(record).encode() + b"\n")
    return digest.hexdigest()
