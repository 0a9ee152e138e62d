"""Replies of lines or sentences: "Response 1: Relevance: 5, Correctness: 4/5, …", in any of the ways models write it.

The text is cut into marks (a response's number, an aspect with its score, a bare number, a total), and the marks must
tell one story. Words may stand around them; a digit that belongs to no mark is a reason to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from rrhf.rewards.judges.replies.scale import (
    CELL,
    LABELS,
    TOTALS,
    Refused,
    Scale,
    Sheet,
    add,
    numbered_from_one,
    refuse_other_scale,
)

LINK = r"(?:\s|[:=|\"'\[(.–—>-])*"  # what may stand between a name and its score
WORDS = r"(?:\s*\([^()\n0-9]{0,120}\))?(?:\s*(?:scores?|ratings?|marks?)\b)?"
AGAIN = rf"(?:(?:scores?|rating|is)\b{LINK})?"
RESPONSE = re.compile(
    rf"(?<!\w)(?:(?:{'|'.join(LABELS)})\s*(?:no\.?|number)?\s*#?\s*|r#?)([0-9]{{1,3}})(?!\w|[.,/%-][0-9])", re.I
)
LIST_MARK = re.compile(r"^[ \t•+\-–]*\(?([0-9]{1,2})[.):](?=[ \t]+\S)", re.M)
DIGITS = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
HEADER_END = re.compile(
    r"[ \t)\]\"'|]*(?:(?:scores?|ratings?|evaluation|assessment)\b[ \t]*)?(?:$|[\n:=|(,\-–—.])", re.I
)
# What may stand before a response's name: on its line, or between it and the score before.
LINE_START = re.compile(
    r"[\s>•+\-–(\[|\"'0-9.)]*(?:(?:the\s+)?(?:scores?|ratings?|evaluation)\s+(?:for|of)\s+|for\s+|and\s+)?[(\[\"']?",
    re.I,
)
SCORE_END = re.compile(r"[\s,;.|/)\]–-]*(?:and\s+)?", re.I)
TUPLE_START = re.compile(rf"{LINK}(?:scores?{LINK})?", re.I)
TUPLE_GAP = re.compile(r"[ \t]*[,;|][ \t]*|[ \t]+|\n[ \t]*")


NEAR = 300  # characters behind a score that are looked at; texts may be long, and their time must not be squared


class Mark(NamedTuple):
    """One thing said: ``kind`` is response, list, aspect (named, without score), item (with), total, bare or digits."""

    kind: str
    start: int
    end: int
    name: str = ""
    value: float = 0.0
    of: float | None = None


@lru_cache(maxsize=64)
def _names(aspects: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The aspects, and the words for totals, as they stand in a text; the longest first."""

    def pattern(names: tuple[str, ...]) -> re.Pattern[str]:
        words = (r"[\s_]+".join(map(re.escape, name.split())) for name in sorted(names, key=len, reverse=True))
        return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.I)

    return pattern(aspects), pattern(tuple(TOTALS))


def marks(text: str, scale: Scale) -> list[Mark]:
    """All marks of a plain text, in order. Raises ``Refused`` where a score is written in a doubtful way."""
    list_marks = {found.start(1): found for found in LIST_MARK.finditer(text)}
    aspects, totals = _names(scale.aspects)
    begin = re.compile(rf"{aspects.pattern}|{totals.pattern}|{RESPONSE.pattern}|[0-9]", re.I)
    found: list[Mark] = []
    place = 0
    while (next_one := begin.search(text, place)) is not None:
        place = next_one.start()
        mark = _mark(text, place, scale, list_marks)
        found.append(mark)
        place = mark.end
    return found


def _mark(text: str, place: int, scale: Scale, list_marks: dict[int, re.Match[str]]) -> Mark:
    aspects, totals = _names(scale.aspects)
    for kind, pattern in (("item", aspects), ("total", totals)):
        named = pattern.match(text, place)
        if named is None:
            continue
        name = scale.aspect(named[0]) or named[0].lower()
        link = re.compile(WORDS + LINK + AGAIN, re.I).match(text, named.end())
        assert link is not None  # it may be empty
        if link.end() not in list_marks and (read := _score(text, link.end(), scale)) is not None:
            return Mark(kind, place, read.end, name, read.value, read.of)
        return Mark("aspect" if kind == "item" else "word", place, named.end(), name)
    if (response := RESPONSE.match(text, place)) is not None:
        return Mark("response", place, response.end(), value=int(response[1]))
    if place in list_marks:
        return Mark("list", place, list_marks[place].end(), value=int(list_marks[place][1]))
    digits = DIGITS.match(text, place)
    assert digits is not None
    return _score(text, place, scale) or Mark("digits", place, digits.end())


def _score(text: str, place: int, scale: Scale) -> Mark | None:
    """The score that begins at ``place``, if one does that nothing beside it changes: no sign, range, unit or word."""
    found = CELL.match(text, place)
    before, after = text[max(place - 2, 0) : place], text[found.end() : found.end() + NEAR] if found else ""
    if found is None or re.search(r"(?:[\w.$+~<≈≤≥%/#^–—-]|(?<![=-])>)\Z", before):
        return None
    if re.match(r"[\w%°^+*\\-]|[.,:/–—][0-9]|\s*[/%×–—-]\s*[0-9]|\s*out\s+of\b", after) and not _comma(after):
        return None
    closed = re.match(r"[\s\"'\])|]*", after)
    assert closed is not None
    rest = after[closed.end() :]
    if "\n" not in closed[0] and rest[:1].isalpha() and not _goes_on(rest, scale):
        return None
    return Mark("bare", place, found.end(), value=float(found["value"]), of=float(found["of"]) if found["of"] else None)


def _comma(after: str) -> bool:
    """Whether a list of scores without spaces goes on here; what is a fraction is told apart by what follows."""
    return re.match(r",[0-9]+(?![.\w])", after) is not None


def _goes_on(rest: str, scale: Scale) -> bool:
    """Whether the words right behind a score begin the next one."""
    aspects, totals = _names(scale.aspects)
    word = re.match(r"and\s+", rest, re.I)
    rest = rest[word.end() :] if word else rest
    return any(pattern.match(rest) for pattern in (aspects, totals, RESPONSE))


# --- the story that the marks tell ---------------------------------------------------------------------------------


@dataclass
class _Block:
    """What is said of one response."""

    number: int
    start: int
    scores: dict[str, float] = field(default_factory=dict)
    bare: list[Mark] = field(default_factory=list)
    totals: list[Mark] = field(default_factory=list)
    list_marks: list[int] = field(default_factory=list)


def read_lists(text: str, scale: Scale, number: int) -> Sheet:
    """The scores in a plain text of lines or sentences. Raises ``Refused``."""
    found = marks(text, scale)
    refuse_other_scale(text[: _begin(found)], scale, number)
    by_aspect = _read_by_aspect(text, found, scale)
    if by_aspect is not None:
        return by_aspect
    if not any(mark.kind == "response" for mark in found):
        if number == 1 and not (any(mark.kind == "list" for mark in found) and _are_responses(found)):
            found = [Mark("response", 0, 0, value=1), *found]
        else:  # a list's numbers are the responses'
            found = [mark._replace(kind="response") if mark.kind == "list" else mark for mark in found]
    sheet: Sheet = {}
    for block in _blocks(text, found, scale, number):
        if block.number in sheet:
            raise Refused(f"response {block.number} is scored twice")
        sheet[block.number] = _scores(text, block, scale)
    return sheet


def _begin(found: list[Mark]) -> int:
    """Where the first response, list or score is named: what stands before are words about all of them."""
    return next((mark.start for mark in found if mark.kind in ("response", "list", "item", "total")), 0)


def _are_responses(found: list[Mark]) -> bool:
    """Whether the numbers of a list stand for responses and not for aspects: each is followed by a list of scores."""
    lists = [place for place, mark in enumerate(found) if mark.kind == "list"]
    return len(lists) == 1 and lists[0] == 0


def _blocks(text: str, found: list[Mark], scale: Scale, number: int) -> Iterator[_Block]:
    block: _Block | None = None
    in_prose = False
    for place, mark in enumerate(found):
        after = found[place + 1] if place + 1 < len(found) else None
        if mark.kind == "response":
            if not _is_header(text, mark, found[place - 1] if place else None, after):
                in_prose = block is not None
                continue
            if block is not None:
                yield block
            block, in_prose = _Block(int(mark.value), mark.end), False
        elif block is None:
            if mark.kind in ("item", "total"):
                raise Refused(f"{mark.name} is scored before any response is named")
        elif mark.kind == "list":
            if after is None or after.kind != "response":
                block.list_marks.append(int(mark.value))
        else:
            _take(text, block, mark, scale, in_prose)
    if block is None:
        raise Refused("no response is named")
    yield block


def _is_header(text: str, mark: Mark, before: Mark | None, after: Mark | None) -> bool:
    """Whether scores of the named response follow; else it is only spoken of, or quoted."""
    if mark.start == mark.end:
        return True
    line = text[text.rfind("\n", 0, mark.start) + 1 : mark.start]
    gap = text[before.end : mark.start] if before is not None and before.kind in ("item", "bare", "total") else None
    quoted = line.rstrip().endswith(("'", '"')) and text[mark.end : mark.end + 1] not in ("'", '"')
    if quoted or not (LINE_START.fullmatch(line) or (gap is not None and SCORE_END.fullmatch(gap))):
        return False
    if HEADER_END.match(text, mark.end):
        return True
    return after is not None and after.kind in ("item", "bare") and not text[mark.end : after.start].strip(" \t|])\"'→")


def _take(text: str, block: _Block, mark: Mark, scale: Scale, in_prose: bool) -> None:
    where = f"response {block.number}"
    if mark.kind == "word":
        return
    if mark.kind == "aspect":
        if re.match(r"\s*(?:\([^()\n]*\)\s*)?[:=|]", text[mark.end : mark.end + NEAR]):
            raise Refused(f"{where}: {mark.name} has no score that can be read")
        return
    if mark.kind == "digits" or in_prose:
        raise Refused(f"{where}: {text[mark.start : mark.end + 8].strip()!r} is no score beyond doubt")
    if mark.kind == "item":
        if mark.name in block.scores:
            raise Refused(f"{where}: {mark.name} is scored twice")
        block.scores[mark.name] = scale.score(mark.value, mark.of, f"{where}: {mark.name}")
    elif mark.kind == "total":
        block.totals.append(mark)
    else:
        block.bare.append(mark)


def _scores(text: str, block: _Block, scale: Scale) -> dict[str, float]:
    where = f"response {block.number}"
    if block.list_marks and not numbered_from_one(iter(block.list_marks)):
        raise Refused(f"{where}: a list that does not count from 1")
    if block.scores and block.bare:
        raise Refused(f"{where}: {block.bare[0].value:g} belongs to no aspect")
    scores = block.scores or _scores_in_order(text, block, scale)
    for total in block.totals:
        scale.check_total(total.name, total.value, total.of, scores)
    return scores


def _scores_in_order(text: str, block: _Block, scale: Scale) -> dict[str, float]:
    """Bare scores, one an aspect in the prompt's order, with the same sign between each two."""
    where = f"response {block.number}"
    if len(block.bare) != len(scale.aspects):
        raise Refused(f"{where}: {len(block.bare)} scores for {len(scale.aspects)} aspects")
    first = block.bare[0]
    start = TUPLE_START.match(text, block.start)
    assert start is not None  # it may be empty
    gaps = [text[one.end : other.start] for one, other in zip(block.bare, block.bare[1:])]
    listed = bool(block.list_marks)
    if not listed and (start.end() < first.start or len(set(gaps)) > 1 or not all(map(TUPLE_GAP.fullmatch, gaps))):
        raise Refused(f"{where}: numbers that may be scores in some order")
    if listed and len(block.list_marks) != len(block.bare):
        raise Refused(f"{where}: a list with more or fewer entries than scores")
    named = zip(scale.aspects, block.bare)
    return {aspect: scale.score(mark.value, mark.of, f"{where}: {aspect}") for aspect, mark in named}


def _read_by_aspect(text: str, found: list[Mark], scale: Scale) -> Sheet | None:
    """Scores aspect by aspect ("Relevance: Response 1: 5, Response 2: 4"); None where the marks go another way."""
    start = next(
        (place for place, mark in enumerate(found) if mark.kind == "aspect" and _leads(text, found, place)), None
    )
    if start is None or any(mark.kind in ("item", "total", "digits") for mark in found):
        return None
    has_labels = any(mark.kind == "response" for mark in found)
    sheet: Sheet = {}
    aspect, response = "", 0
    for place, mark in enumerate(found[start:], start):
        if mark.kind == "aspect":
            if not _leads(text, found, place):
                return None
            aspect, response = mark.name, 0
        elif mark.kind == "response" or (mark.kind == "list" and not has_labels):
            response = int(mark.value)
        elif mark.kind == "bare" and response and re.fullmatch(LINK, text[found[place - 1].end : mark.start]):
            add(sheet, response, aspect, scale.score(mark.value, mark.of, f"response {response}: {aspect}"))
            response = 0
        elif mark.kind != "list":
            return None
    return sheet


def _leads(text: str, found: list[Mark], place: int) -> bool:
    """Whether an aspect's name is a heading over responses."""
    mark = found[place]
    after = found[place + 1] if place + 1 < len(found) else None
    if after is None or after.kind not in ("response", "list"):
        return False
    return re.fullmatch(r"(?:\s*\([^()\n0-9]*\))?[\s:|–—.-]*", text[mark.end : after.start]) is not None


def refuse_scores(before: str, after: str, scale: Scale) -> None:
    """Refuse scores in the words around a table or JSON: they might contradict it, or be the ones that are meant.

    A response named right before it is refused too: it may be another one than the table or JSON is taken to be about.
    """
    for text, is_before in ((before, True), (after, False)):
        for mark in marks(text, scale):
            if mark.kind in ("item", "total") or (mark.kind in ("bare", "digits", "list") and not is_before):
                raise Refused("numbers beside the table or JSON that holds the scores")
            if is_before and mark.kind == "response" and not re.search(r"\w", text[mark.end :].replace("json", "")):
                raise Refused("a response named before the table or JSON that holds the scores")
