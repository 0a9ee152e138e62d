"""The strict reader of judges' replies: replies by hand with their verdicts, and generated ones, whole and damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rrhf.rewards.judges.parse import Refusal, Scale, Scores, parse_reply
from support.judge_replies import ASPECTS, Reply, replies

SCALE = Scale(ASPECTS)
REPLIES = replies()


def values(read: Scores | Refusal) -> list[list[float]] | None:
    return None if isinstance(read, Refusal) else [list(scores.values()) for scores in read]


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: reply.name)
def test_each_reply_has_its_verdict(reply: Reply) -> None:
    read = parse_reply(reply.text, SCALE, reply.number)
    assert values(read) == reply.scores, read
    if isinstance(read, Refusal):
        assert read.reason
    else:
        assert all(tuple(scores) == ASPECTS for scores in read)


def lenient(text: str, number: int) -> list[list[float]] | None:
    """A reader as they are often written: the numbers behind the names, or else all numbers in their order."""
    parts = re.split(r"response\s*#?\d+", text, flags=re.I)[1:]
    scores = [[re.search(rf"{name}\D*?(\d+(?:\.\d+)?)", part, re.I) for name in ASPECTS] for part in parts[:number]]
    if len(scores) == number and all(found for row in scores for found in row):
        return [[float(found[1]) for found in row if found] for row in scores]
    numbers = [float(found) for found in re.findall(r"\d+(?:\.\d+)?", text)]
    if len(numbers) >= number * len(ASPECTS):
        size = len(ASPECTS)
        last = numbers[-number * size :]
        return [last[start : start + size] for start in range(0, len(last), size)]
    return None


def test_the_replies_are_many_and_a_lenient_reader_fails_them() -> None:
    assert len({reply.text for reply in REPLIES}) >= 250
    taken = [reply for reply in REPLIES if reply.scores is not None]
    assert len(taken) >= 100 and len(REPLIES) - len(taken) >= 100
    wrong = [reply for reply in REPLIES if lenient(reply.text, reply.number) != reply.scores]
    guessed = [reply for reply in wrong if lenient(reply.text, reply.number) is not None]
    assert len(wrong) > len(REPLIES) / 4 and len(guessed) > len(REPLIES) / 6


def test_other_scales() -> None:
    ten = Scale(("Overall quality",), 1, 10)
    assert parse_reply("Response 1: 8\nResponse 2: 10", ten, 2) == [{"Overall quality": 8.0}, {"Overall quality": 10.0}]
    assert parse_reply("Response 1: Overall quality: 7/10", ten, 1) == [{"Overall quality": 7.0}]
    assert isinstance(parse_reply("Response 1: 11", ten, 1), Refusal)
    whole = Scale(("Grammar", "Depth of thought"), 0, 3, integers=True)
    assert parse_reply("Response 1: depth_of_thought 2, grammar 0", whole, 1) == [{"Grammar": 0, "Depth of thought": 2}]
    assert isinstance(parse_reply("Response 1: Grammar: 2.5, Depth of thought: 2", whole, 1), Refusal)


def test_a_reply_as_long_as_a_book_is_refused_at_once() -> None:
    for piece in ("Response 1: ", "Relevance ", "5 ", "Relevance: 5, ", "[", '{"a":', "| 5 ", "1. 5\n", "("):
        assert isinstance(parse_reply(piece * (29_000 // len(piece)), SCALE, 1), Refusal)
        assert isinstance(parse_reply(piece * 60_000, SCALE, 1), Refusal)


# --- generated replies: what is written is read, and damage never turns into other numbers --------------------------

Table = list[list[int]]


def as_lines(table: Table, draw: Callable[..., str]) -> str:
    colon, comma = draw([": ", " ", " - ", ":", " = "]), draw([", ", "; ", "\n- ", "\n", " | "])
    unit, bold = draw(["", "/5", " out of 5", " points"]), draw(["", "**"])
    blocks = [
        f"{bold}Response {number}{bold}:{draw([' ', chr(10)])}"
        + comma.join(f"{name}{colon}{score}{unit}" for name, score in zip(ASPECTS, row))
        for number, row in enumerate(table, 1)
    ]
    return draw(["", "Here are the scores:\n\n"]) + draw(["\n", "\n\n"]).join(blocks)


def as_numbers(table: Table, draw: Callable[..., str]) -> str:
    gap = draw([", ", ",", " ", "; "])
    return "\n".join(f"Response {number}: {gap.join(map(str, row))}" for number, row in enumerate(table, 1))


def as_table(table: Table, draw: Callable[..., str]) -> str:
    names = [f"Response {number}" for number in range(1, len(table) + 1)]
    rows = [["", *ASPECTS], *([name, *map(str, row)] for name, row in zip(names, table))]
    if draw(["", "turned"]):
        rows = [list(column) for column in zip(*rows)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def as_json(table: Table, draw: Callable[..., str]) -> str:
    if draw(["", "list"]):
        content: object = [{"response": n, **dict(zip(ASPECTS, row))} for n, row in enumerate(table, 1)]
    else:
        content = {f"Response {n}": dict(zip(ASPECTS, row)) for n, row in enumerate(table, 1)}
    text = json.dumps(content, indent=2 if draw(["", "indented"]) else None)
    return f"```json\n{text}\n```" if draw(["", "fence"]) else text


def by_aspect(table: Table, draw: Callable[..., str]) -> str:
    label = draw(["Response {}: ", "{}. "])
    return "\n".join(
        f"{name}:\n" + "\n".join(f"{label.format(number)}{row[place]}" for number, row in enumerate(table, 1))
        for place, name in enumerate(ASPECTS)
    )


WRITERS = (as_lines, as_numbers, as_table, as_json, by_aspect)
TABLES = st.lists(st.lists(st.integers(1, 5), min_size=4, max_size=4), min_size=1, max_size=5)


@st.composite
def written(draw: st.DrawFn) -> tuple[Table, str]:
    table = draw(TABLES)
    writer = draw(st.sampled_from(WRITERS))
    return table, writer(table, lambda choices: draw(st.sampled_from(choices)))


@st.composite
def damaged(draw: st.DrawFn) -> tuple[Table, str]:
    """A reply after something happened to it that makes no other valid reply: no digit becomes another one."""
    table, text = draw(written())
    lines, place = text.split("\n"), draw(st.integers(0, len(text)))
    kind = draw(st.sampled_from(["cut", "character lost", "character too many", "line lost", "line twice"]))
    if kind == "cut":
        return table, text[:place]
    if kind == "character lost":
        return table, text[:place] + text[place + 1 :]
    if kind == "character too many":
        return table, text[:place] + draw(st.sampled_from("0123456789 \n.,:;-/|%+{}[]()\"'xR*")) + text[place:]
    row = draw(st.integers(0, len(lines) - 1))
    return table, "\n".join(lines[:row] + lines[row : row + 1] * (2 if kind == "line twice" else 0) + lines[row + 1 :])


@settings(max_examples=150, deadline=None)
@given(written())
def test_what_is_written_is_read(case: tuple[Table, str]) -> None:
    table, text = case
    assert values(parse_reply(text, SCALE, len(table))) == table, text


@settings(max_examples=400, deadline=None)
@given(damaged())
def test_damage_is_refused_or_harmless(case: tuple[Table, str]) -> None:
    table, text = case
    assert values(parse_reply(text, SCALE, len(table))) in (None, table), text


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('Response12345Relvanc:,.|{}[]"\n -/'), max_size=200), st.integers(1, 3))
def test_no_reply_makes_the_reader_fail(text: str, number: int) -> None:
    read = parse_reply(text, SCALE, number)
    assert isinstance(read, Refusal) or len(read) == number
