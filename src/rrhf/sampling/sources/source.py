"""What every source of responses is."""

from __future__ import annotations

from collections.abc import Iterator

from rrhf.records.record import Record

Answers = Iterator[tuple[int, Record]]
