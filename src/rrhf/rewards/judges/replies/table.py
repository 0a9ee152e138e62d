"""Replies that are a Markdown table: a row a response, or a row an aspect."""

from __future__ import annotations

import re

from rrhf.rewards.judges.replies.scale import TOTALS, Refused, Scale, Sheet, add, cell, fold, response_number

RULE = re.compile(r"[\s|:+\-=–—]+")
FRAME = re.compile(r"\s*\+[-=+]+\+\s*")
COMMENTS = ("comment", "comments", "explanation", "notes", "note", "remarks", "reason", "justification", "rationale")


def find_table(text: str, scale: Scale) -> tuple[list[list[str]], str, str] | None:
    """The rows of the one table whose head names the aspects or the responses, with the text before and after it."""
    lines = [line for line in text.split("\n") if not FRAME.fullmatch(line)]
    starts = [
        place
        for place, line in enumerate(lines)
        if "|" in line and (place == 0 or "|" not in lines[place - 1]) and _is_head(_cells(line), scale)
    ]
    if len(starts) != 1:
        return None
    end = next((place for place in range(starts[0], len(lines)) if "|" not in lines[place]), len(lines))
    rows = [_cells(line) for line in lines[starts[0] : end] if not RULE.fullmatch(line)]
    return rows, "\n".join(lines[: starts[0]]), "\n".join(lines[end:])


def _cells(line: str) -> list[str]:
    return [" ".join(part.split()) for part in line.strip().removeprefix("|").removesuffix("|").split("|")]


def _is_head(cells: list[str], scale: Scale) -> bool:
    aspects = sum(scale.aspect(name) is not None for name in cells)
    responses = sum(response_number(name) is not None for name in cells[1:])
    words = not any(cell(name) for name in cells[1:]) or responses > 0
    return words and (aspects == len(scale.aspects) or (responses > 0 and aspects == 0 and len(cells) > 1))


def read_table(rows: list[list[str]], scale: Scale) -> Sheet:
    """The scores of a table. Raises ``Refused``."""
    head, *body = rows
    if any(len(row) != len(head) for row in body):
        raise Refused("a table whose rows differ in length")
    if not any(scale.aspect(name) for name in head):
        head, *body = ([*column] for column in zip(*rows, strict=True))
    sheet: Sheet = {}
    for row in body:
        number = response_number(row[0])
        if number is None:
            raise Refused(f"a table's row {row[0]!r}, which is no response")
        if number in sheet:
            raise Refused(f"response {number} has two rows")
        sheet[number] = {}
        _read_row(sheet, number, list(zip(head, row))[1:], scale)
    return sheet


def _read_row(sheet: Sheet, number: int, cells: list[tuple[str, str]], scale: Scale) -> None:
    totals = []
    for name, text in cells:
        aspect, read = scale.aspect(name), cell(text)
        kind = next((word for word in TOTALS if word in fold(name).split()), None)
        if aspect is None and kind is None:
            if fold(name) not in COMMENTS or re.search("[0-9]", text):
                raise Refused(f"a table's column {name!r}, which is no aspect")
            continue
        if read is None:
            raise Refused(f"response {number}: {name} has no score")
        if aspect is not None:
            add(sheet, number, aspect, scale.score(*read, f"response {number}: {aspect}"))
        elif kind is not None:
            totals.append((kind, *read))
    for kind, value, denominator in totals:
        scale.check_total(kind, value, denominator, sheet[number])
