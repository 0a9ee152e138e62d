"""What a judge replied → a score an aspect and response, or the reason why the reply is refused. Never a guess.

A reply counts where it gives exactly one score within the range for each aspect of each response, names every response
by its number, and says nothing that contradicts this: no score twice, none too many, no total that does not add up, no
number whose meaning is open.
"""

from __future__ import annotations

from dataclasses import dataclass

from rrhf.rewards.judges.replies.json_reply import find_json, read_json
from rrhf.rewards.judges.replies.lists import read_lists, refuse_scores
from rrhf.rewards.judges.replies.plain import plain, without_thoughts
from rrhf.rewards.judges.replies.scale import Refused, Scale, Sheet, refuse_other_scale
from rrhf.rewards.judges.replies.table import find_table, read_table

__all__ = ["Refusal", "Scale", "Scores", "parse_reply"]

Scores = list[dict[str, float]]  # one a response, in order: aspect → score
LONGEST = 30_000  # characters without a reasoner's thoughts


@dataclass(frozen=True)
class Refusal:
    """A reply that was not taken, and why."""

    reason: str


def parse_reply(text: str, scale: Scale, number: int) -> Scores | Refusal:
    """Read a judge's reply about ``number`` responses.

    Args:
        text: the reply: lines, sentences, a Markdown table or JSON, with words around them or not.
        scale: the aspects and the range of their scores.
        number: how many responses were to be scored; they are called 1 to ``number``.

    Returns:
        ``number`` dictionaries with every aspect of ``scale`` in its order, or a ``Refusal``.
    """
    try:
        sheet = _read(text, scale, number)
        _refuse_incomplete(sheet, scale, number)
    except Refused as refused:
        return Refusal(refused.reason)
    return [{aspect: sheet[place][aspect] for aspect in scale.aspects} for place in range(1, number + 1)]


def _read(text: str, scale: Scale, number: int) -> Sheet:
    text = without_thoughts(text)
    if len(text) > LONGEST:
        raise Refused(f"more than {LONGEST} characters")
    words = plain(text, scale.low, scale.high)
    held = find_json(text)
    if held is not None:
        values, before, after = held
        before, after = (plain(part, scale.low, scale.high) for part in (before, after))
        _refuse_beside(before, after, scale, number)
        return read_json(values, scale, number)
    table = find_table(words, scale)
    if table is not None:
        rows, before, after = table
        _refuse_beside(before, after, scale, number)
        return read_table(rows, scale)
    return read_lists(words, scale, number)


def _refuse_beside(before: str, after: str, scale: Scale, number: int) -> None:
    """Refuse what the words around a table or JSON may make of its scores."""
    refuse_scores(before, after, scale)
    for text in (before, after):
        refuse_other_scale(text, scale, number)


def _refuse_incomplete(sheet: Sheet, scale: Scale, number: int) -> None:
    wanted = set(range(1, number + 1))
    if extra := sorted(set(sheet) - wanted):
        raise Refused(f"response {extra[0]}, and there are {number}")
    if missing := sorted(wanted - set(sheet)):
        raise Refused(f"response {missing[0]} is missing")
    for place in sorted(wanted):
        lacking = [aspect for aspect in scale.aspects if aspect not in sheet[place]]
        if lacking:
            raise Refused(f"response {place}: {lacking[0]} is missing")
