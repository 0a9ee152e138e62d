"""What a judge scores, and what every reader of its replies shares."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# How replies call the responses; the prompt says the first.
LABELS = ("response", "answer", "reply", "candidate", "assistant", "output")

Sheet = dict[int, dict[str, float]]  # number of a response, from 1 → aspect → score


class Refused(Exception):  # noqa: N818 - a judge's reply is at fault, not a program
    """A reply that does not say, beyond doubt, one score an aspect for each response."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Scale:
    """What a judge scores each response on.

    Attributes:
        aspects: names, of which none differs from another by its capitals alone.
        low, high: the range of each score, both included.
        integers: whether fractions such as 4.5 are out of range.
    """

    aspects: tuple[str, ...]
    low: float = 1
    high: float = 5
    integers: bool = False
    _by_key: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_key", {fold(aspect): aspect for aspect in self.aspects})

    def aspect(self, name: str) -> str | None:
        """The aspect of this name, whatever its capitals and underscores; None for another word."""
        return self._by_key.get(fold(name))

    def score(self, value: float, denominator: float | None, where: str) -> float:
        """``value`` where it is in the range. Raises ``Refused`` where it is not, or is out of another number."""
        if denominator is not None and denominator != self.high:
            raise Refused(f"{where}: a score out of {denominator:g}, not of {self.high:g}")
        if not self.low <= value <= self.high:
            raise Refused(f"{where}: {value:g} is out of range")
        if self.integers and value != int(value):
            raise Refused(f"{where}: {value:g} is no whole number")
        return float(value)

    def check_total(self, kind: str, value: float, denominator: float | None, scores: dict[str, float]) -> None:
        """Refuse a total that contradicts the scores. ``kind``: a word of ``TOTALS``."""
        if len(scores) < len(self.aspects):
            raise Refused("a total, and not every score")
        total, mean = math.fsum(scores.values()), math.fsum(scores.values()) / len(scores)
        whole = self.high * len(self.aspects)
        is_sum = math.isclose(value, total) and denominator in (None, whole)
        # A mean is written with one digit or two.
        is_mean = abs(value - mean) <= 0.05 + 1e-9 and denominator in (None, self.high)
        if not ((is_sum and TOTALS[kind][0]) or (is_mean and TOTALS[kind][1])):
            raise Refused(f"the {kind} {value:g} contradicts the scores")


# What a total may be called → whether it may be the sum, whether the mean.
TOTALS = {
    "total": (True, False),
    "sum": (True, False),
    "overall": (True, True),
    "average": (False, True),
    "mean": (False, True),
}


def fold(name: str) -> str:
    """A name as names are compared."""
    return " ".join(name.replace("_", " ").casefold().split())


def add(sheet: Sheet, number: int, aspect: str, score: float) -> None:
    """Write a score down. Raises ``Refused`` where one stands there already, be it the same."""
    scores = sheet.setdefault(number, {})
    if aspect in scores:
        raise Refused(f"response {number}: {aspect} is scored twice")
    scores[aspect] = score


CELL = re.compile(
    r"(?P<value>[0-9]{1,4}(?:\.[0-9]{1,3})?)"
    r"(?:\s*(?:/|out\s+of\b|of\b)\s*(?P<of>[0-9]{1,4}(?:\.[0-9]{1,3})?))?"
    r"(?:\s*(?:points?|pts?|stars?|marks?)\b)?",
    re.I,
)  # a score as replies write it: 4, 4.5, 4/5, 4 out of 5, 4 points


def cell(text: str) -> tuple[float, float | None] | None:
    """A score that is all of ``text``, and what it is out of where that is said; None for anything else."""
    found = CELL.fullmatch(text.strip())
    return None if found is None else (float(found["value"]), float(found["of"]) if found["of"] else None)


_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
OTHER_SCALES = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        rf"\bscales?\b[^\n.;]{{0,20}}?(?<![\w.]){_NUMBER}\s*(?:-|–|—|to)\s*{_NUMBER}(?![\w%])",
        rf"[(\[]\s*(?:from\s+)?{_NUMBER}\s*(?:-|–|—|to)\s*{_NUMBER}\s*[)\]]",
        rf"\bout\s+of\s+{_NUMBER}(?![\w%])",
        rf"(?<![0-9\s])\s*/\s*{_NUMBER}(?=\s*[)\]:])",
        rf"(?<![\w.]){_NUMBER}[\s-]points?\b",
    )
)
NAMED = re.compile(rf"\b(?:{'|'.join(LABELS)})s?\s*#?\s*[0-9]+", re.I)
TURNED = re.compile(
    r"\b(?:lower|smaller|less)\s+(?:scores?\s+|numbers?\s+|values?\s+)?(?:is|are|means?)\s+better\b", re.I
)
ENDS = re.compile(
    rf"(?<![\w.]){_NUMBER}\s*(?:=|:|is|being|means|meaning)\s*(?:the\s+)?"
    r"(?:(best|highest|excellent|perfect)|(worst|lowest|poorest))\b",
    re.I,
)


def refuse_other_scale(text: str, scale: Scale, number: int) -> None:
    """Refuse words around the scores that state another scale: "out of 10", "on a scale of 1 to 10", "1 = best".

    Args:
        text: words without scores, from which ``plain`` has taken the scale itself.
        scale: the one that was asked for.
        number: of responses; "(1-3)" may count them.
    """
    text = NAMED.sub(" ", text)  # "Response 2 is the best" says nothing of a scale
    ends = [scale.low, scale.high]
    for pattern in OTHER_SCALES:
        for found in pattern.finditer(text):
            numbers = [float(value) for value in found.groups()]
            if numbers not in (ends, [scale.high], [1.0, float(number)]):
                raise Refused("another scale is stated")
    if TURNED.search(text):
        raise Refused("another scale is stated")
    for value, best, _ in ENDS.findall(text):
        if float(value) != (scale.high if best else scale.low):
            raise Refused("another scale is stated")


def response_number(text: str) -> int | None:
    """The number of the response that ``text`` names: ``Response 1``, ``answer_2``, ``3``; None for another text."""
    found = re.fullmatch(rf"(?:(?:{'|'.join(LABELS)}|r)\s*)?(?:no\.?\s*|number\s*)?#?([0-9]{{1,3}})", fold(text))
    return int(found[1]) if found else None


def numbered_from_one(numbers: Iterator[int]) -> bool:
    """Whether these are 1, 2, 3 …"""
    return all(number == place for place, number in enumerate(numbers, 1))
