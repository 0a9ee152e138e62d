"""How numbers, texts and tables are printed: in a terminal, in Markdown and on a page."""

from __future__ import annotations

import html
import math
import numbers
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"  # where there is no number

Row = Sequence[str]


def finite(value: Any) -> float | None:
    """Return ``value`` as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int = 3, sign: bool = False, thousands: bool = False) -> str:
    """A number with ``digits`` decimals, or a dash where ``value`` is no finite number.

    ``sign`` puts a plus before what is not negative, ``thousands`` a comma between groups of three digits.
    """
    amount = finite(value)
    return NONE if amount is None else f"{amount:{'+' if sign else ''}{',' if thousands else ''}.{digits}f}"


def typeset_number(value: Any, digits: int = 3, sign: bool = False) -> str:
    """As ``number``, for a page: a true minus sign, and a narrow space between groups of three digits."""
    return number(value, digits, sign, thousands=True).replace("-", "−").replace(",", "\u202f")


def quantity(value: Any) -> str:
    """A count whole, a measure with 3 decimals below 100 and with 1 from there on, thousands apart; a dash for none."""
    if isinstance(value, int):
        return f"{value:,}"
    amount = finite(value)
    return number(amount, 3 if amount is None or abs(amount) < 100 else 1, thousands=True)


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 as per cent, or a dash for none."""
    return NONE if share is None else f"{share:.{digits}%}"


def rate(interval: Mapping[str, float] | None) -> str:
    """``62.5% (51.2% to 73.7%)`` for a share with ``mean``, ``low`` and ``high``, or a dash for none."""
    if interval is None:
        return NONE
    return f"{percent(interval['mean'])} ({percent(interval['low'])} to {percent(interval['high'])})"


def describe_counts(counts: Mapping[str, int]) -> str:
    """``3 empty response dropped; 1 …`` for the reasons counted."""
    return "; ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def describe_shares(shares: Mapping[str, float]) -> str:
    """``top-p 75%, human 25%``, in the order given."""
    return ", ".join(f"{name} {percent(share, 0)}" for name, share in shares.items())


def shorten(text: str, width: int) -> str:
    """The text in one line of at most ``width`` characters, cut at a word."""
    return textwrap.shorten(" ".join(text.split()), width, placeholder=" …")


def short_name(name: str) -> str:
    """Shorten "pkg.module:function" to "function", and a folder or hub id to its last part."""
    return name.rpartition(":")[2].rstrip("/").rpartition("/")[2] or name


def clean(text: str) -> str:
    """Replace what no HTML page can hold: lone surrogates and control characters other than tab and newline."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


# --- tables ------------------------------------------------------------------------------------------------------
#
# A table is its header, all of whose cells are empty where it has none, and rows of as many cells.


def text_table(header: Row, rows: Sequence[Row], indent: str = "") -> str:
    """A table as lines of text: the first column left-aligned, the others right-aligned."""
    shown = [header, *rows] if any(header) else rows
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in shown:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(indent + "  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(header: Row, rows: Sequence[Row]) -> str:
    """A table in GitHub's Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def html_table(header: Row, rows: Sequence[Row]) -> str:
    """A table as an HTML element, every cell escaped."""

    def line(row: Row, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    head = line(header, "th") if any(header) else ""
    return f"<table>{head}{''.join(line(row, 'td') for row in rows)}</table>"
