"""What the tags of responses say of where they came from."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.records.files import read_records

JOIN = "|"  # between the tags of a merged response: "top-p/0|diverse-beam/2"
COUNTED = 20_000  # records of the training file that are looked at for the shares of their sources


def source_name(tag: str) -> str:
    """Return what a response's tag is grouped by: ``top-p/3`` is ``top-p``, ``human/chosen`` stays itself."""
    name, slash, number = tag.rpartition("/")
    return name if slash and number.isdigit() else tag


def source_names(tag: str) -> list[str]:
    """Return every source of a response; a merged one has several: ``top-p/0|diverse-beam/2``."""
    return list(dict.fromkeys(map(source_name, tag.split(JOIN))))


def source_shares(path: Any, limit: int | None = COUNTED) -> dict[str, Any]:
    """Shares of a file's sources and whether its queries are messages; empty where it cannot be read."""
    sources: Counter[str] = Counter()
    messages = number = responses = 0
    try:
        for record in islice(read_records(Path(str(path))), limit):
            number += 1
            responses += len(record.responses)
            messages += not isinstance(record.query, str)
            sources.update(name for tag in record.sources for name in source_names(tag))
    except UserError:
        return {}
    total = sum(sources.values())
    shares = {name: count / total for name, count in sources.most_common()}
    return {"sources": shares, "messages": 2 * messages >= number, "records": number, "responses": responses}
