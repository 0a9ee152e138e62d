"""What the functions of all formats need: the columns of a row, and the row that none can use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rrhf.records.record import FIELDS, Message, Query

ForeignRow = dict[str, Any]
Format = Callable[[ForeignRow], ForeignRow | None]

CHOSEN_SOURCES = ["human/chosen", "human/rejected"]
CHOSEN_SCORES = [1.0, 0.0]


class SkipRowError(Exception):
    """A row that a format cannot use. Its message is the reason, in words that do not depend on the row."""


def grouped(column: str) -> Callable[[Format], Format]:
    """Declare that a format takes all rows in succession with one value of ``column``: ``{column: …, "rows": […]}``."""

    def declare(format: Format) -> Format:
        format.group_by = column  # type: ignore[attr-defined]
        return format

    return declare


def unused(row: ForeignRow, *used: str) -> ForeignRow:
    """Return the columns a format did not use; those with a name of ours become ``original_…``, but an id stays."""
    rest = {}
    for name, value in row.items():
        if name == "id" and isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            rest["id"] = str(value)
        elif name not in used:
            rest[f"original_{name}" if name in FIELDS else name] = value
    return rest


def value_of(row: ForeignRow, name: str) -> Any:
    """What stands in a column. Raises ``SkipRowError`` where there is nothing."""
    if row.get(name) is None:
        raise SkipRowError(f"no `{name}`")
    return row[name]


def text_of(row: ForeignRow, name: str) -> str:
    """The text in a column. Raises ``SkipRowError`` where there is none."""
    value = value_of(row, name)
    if not isinstance(value, str):
        raise SkipRowError(f"`{name}` is no text")
    return value


def user(text: str) -> list[Message]:
    """A query of one user message."""
    return [{"role": "user", "content": text}]


def with_system(query: Query, row: ForeignRow) -> Query:
    """The query behind the row's ``system`` prompt, unless it begins with one.

    Where the row has that column, a query of text becomes a user message, also if the prompt is empty. Raises
    ``SkipRowError`` where it is no text.
    """
    if "system" not in row:
        return query
    system = row["system"] or ""
    if not isinstance(system, str):
        raise SkipRowError("`system` is no text")
    messages = user(query) if isinstance(query, str) else query
    begins = isinstance(messages, list) and messages and isinstance(messages[0], dict) and messages[0].get("role")
    if not isinstance(messages, list) or not system.strip() or begins == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


# The names under which the ratings of a pair stand: chosen, rejected.
PAIR_RATINGS = (
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("score_chosen", "score_rejected"),
)


def number_of(value: Any) -> float | None:
    """A rating as a number, also where it is written as text; None for "N/A" and whatever else is none."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):  # no number, or a whole one of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def chosen_row(query: Query, chosen: str, rejected: str, rest: ForeignRow) -> ForeignRow:
    """The row of a query and its pair, scored 1 and 0; ``rest`` travels along."""
    if chosen == rejected:
        raise SkipRowError("chosen and rejected are the same")
    return {
        **rest,
        "query": query,
        "responses": [chosen, rejected],
        "sources": list(CHOSEN_SOURCES),
        "scores": list(CHOSEN_SCORES),
    }
