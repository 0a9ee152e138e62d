"""Supervised fine-tuning: Eq. 4 alone, which is RRHF with one response a query (``ranking_loss none``)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rrhf.common.errors import UserError
from rrhf.common.presentation import describe_counts
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.records.sources import JOIN

log = logging.getLogger("rrhf")

FITTED = 1.0  # the score of the one response: it is the best of its query, whatever a reward would say


def write_responses_of(tag: str, data: Path, output: Path) -> Path:
    """Write the records of ``data`` with the response tagged ``tag`` alone to ``output``, and return ``output``.

    Raises:
        UserError: no record has such a response; the message names the tags there are.
    """
    counts: Counter[str] = Counter()
    seen: Counter[str] = Counter()

    def kept() -> Iterator[Record]:
        for record in read_records(data, require="responses", empty_responses="drop"):
            tags = [joined.split(JOIN) for joined in record.sources]
            seen.update(name for names in tags for name in names)
            index = next((i for i, names in enumerate(tags) if tag in names), None)
            if index is None:
                counts[f"without a response of {tag}"] += 1
            else:
                yield replace(record.keeping([index]), scores=[FITTED], rewards={})

    records = list(kept())
    if not records:
        raise UserError(
            f"{data}: no response has the source {tag}: name one of {', '.join(sorted(seen)[:20]) or 'those that have'}"
        )
    write_records(output, records, overwrite=True)
    log.info(f"sft: {len(records)} queries with a response of {tag}: {output.name}")
    if counts:
        log.info(describe_counts(counts))
    return output
