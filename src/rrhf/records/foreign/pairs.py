"""Pairs: a chosen response and a rejected one."""

from __future__ import annotations

import re
from typing import Any

from rrhf.records.foreign.instructions import INSTRUCTION, instruction_of
from rrhf.records.foreign.rows import (
    PAIR_RATINGS,
    ForeignRow,
    SkipRowError,
    chosen_row,
    number_of,
    text_of,
    unused,
    user,
    value_of,
    with_system,
)
from rrhf.records.record import Message, Query

LAST_TURN = "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def _hh_parts(row: ForeignRow) -> tuple[str, str, str]:
    """Return an HH row's query, which ends in ``\\n\\nAssistant:``, and its chosen and rejected responses."""
    dialogues = text_of(row, "chosen"), text_of(row, "rejected")
    cuts = [dialogue.rfind(LAST_TURN) + len(LAST_TURN) for dialogue in dialogues]
    if min(cuts) < len(LAST_TURN):
        raise SkipRowError("a dialogue without an Assistant turn")
    if dialogues[0][: cuts[0]] != dialogues[1][: cuts[1]]:
        raise SkipRowError("the two dialogues part before the last turn")
    return dialogues[0][: cuts[0]], dialogues[0][cuts[0] :], dialogues[1][cuts[1] :]


def hh(row: ForeignRow) -> ForeignRow:
    """Anthropic HH as plain text: the query ends in ``\\n\\nAssistant:``, a response starts with the space after it."""
    return chosen_row(*_hh_parts(row), unused(row, "chosen", "rejected"))


def hh_chat(row: ForeignRow) -> ForeignRow:
    """Anthropic HH as messages, for models with a chat template."""
    query, chosen, rejected = _hh_parts(row)
    start, *turns = TURN.split(query)
    if start.strip():
        raise SkipRowError("text before the first turn")
    messages = [
        {"role": ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]
    return chosen_row(messages[:-1], chosen.strip(), rejected.strip(), unused(row, "chosen", "rejected"))


def static(row: ForeignRow) -> ForeignRow:
    """Dahoas/rm-static and its kin: ``prompt``, ``chosen``, ``rejected``; ``response`` repeats the chosen one."""
    rest = unused(row, "prompt", "response", "chosen", "rejected")
    return chosen_row(text_of(row, "prompt"), text_of(row, "chosen"), text_of(row, "rejected"), rest)


SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def sharegpt(row: ForeignRow) -> ForeignRow:
    """ShareGPT's ``conversations`` (from, value); with ``chosen`` and ``rejected`` a pair, else its last turn.

    A text ``system`` is its system prompt; a pair is scored by its ratings where it brings them, else 1 and 0.
    """
    turns = value_of(row, "conversations")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and turn["from"] in SPEAKERS for turn in turns
    ):
        raise SkipRowError("`conversations` is no list of turns from human, gpt or system")
    messages = [{"role": SPEAKERS[turn["from"]], "content": text_of(turn, "value")} for turn in turns]
    used = ("conversations", "chosen", "rejected", "system")
    if isinstance(row.get("chosen"), dict) and isinstance(row.get("rejected"), dict):
        query, texts = with_system(messages, row), [text_of(row[name], "value") for name in ("chosen", "rejected")]
        for names in PAIR_RATINGS:
            ratings = [number_of(row.get(name)) for name in names]
            if None not in ratings:
                return {**chosen_row(query, texts[0], texts[1], unused(row, *used, *names)), "scores": ratings}
        return chosen_row(query, texts[0], texts[1], unused(row, *used))
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise SkipRowError("the conversation does not end with an answer")
    return {**unused(row, *used), "query": with_system(messages[:-1], row), "responses": [messages[-1]["content"]]}


def preference(row: ForeignRow) -> ForeignRow:
    """TRL's preference rows, as text or messages; without ``prompt`` it is what chosen and rejected share.

    Of texts without ``prompt`` the query may stand in ``instruction`` (with ``input``, as Alpaca's), ``question`` or
    ``query``. A ``system`` prompt comes first.
    """
    chosen, rejected = value_of(row, "chosen"), value_of(row, "rejected")
    kinds = {type(chosen), type(rejected)}
    if kinds not in ({str}, {list}):
        raise SkipRowError("chosen and rejected are neither two texts nor two lists of messages")
    if kinds == {str} and row.get("prompt") is None:
        return _preference_without_prompt(row, chosen, rejected)
    parts = _preference_texts if kinds == {str} else _preference_messages
    query, first, second = parts(row.get("prompt"), chosen, rejected)
    return chosen_row(with_system(query, row), first, second, unused(row, "prompt", "chosen", "rejected", "system"))


def _preference_without_prompt(row: ForeignRow, chosen: str, rejected: str) -> ForeignRow:
    """Two texts whose query stands in another column, or is what they begin with."""
    columns = [name for name in ("instruction", "question", "query", "input") if _has_text(row, name)]
    if not columns:
        query, first, second = _preference_texts(None, chosen, rejected)
        return chosen_row(with_system(query, row), first, second, unused(row, "chosen", "rejected", "system"))
    name = columns[0]
    if row[name].strip() in chosen[: _shared(chosen, rejected)]:
        raise SkipRowError(f"chosen and rejected both have the text of `{name}` at their start: drop that column")
    if name == "input":
        raise SkipRowError("chosen and rejected with `input`, but no `prompt` nor `instruction`: rename it")
    if name == "instruction":
        return chosen_row(instruction_of(row), chosen, rejected, unused(row, *INSTRUCTION, "chosen", "rejected"))
    query = user(row[name]) if name == "question" else row[name]
    return chosen_row(with_system(query, row), chosen, rejected, unused(row, name, "chosen", "rejected", "system"))


def _has_text(row: ForeignRow, name: str) -> bool:
    value = row.get(name)
    return isinstance(value, str) and bool(value.strip())


def _preference_texts(prompt: Any, chosen: str, rejected: str) -> tuple[Query, str, str]:
    if prompt is not None:
        return prompt, chosen, rejected
    shared = _shared(chosen, rejected)
    if shared and chosen[shared - 1] == " ":
        shared -= 1  # the space belongs to the response, as in TRL
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _preference_messages(prompt: Any, chosen: list[Message], rejected: list[Message]) -> tuple[Query, str, str]:
    shared = _shared(chosen, rejected)
    query = chosen[:shared]
    if not query and isinstance(prompt, list):
        query = prompt
    elif not query and isinstance(prompt, str):
        query = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and query[: len(prompt)] != prompt:
        # The prompt begins earlier, with a system message; or completions have several messages, the first shared.
        query = prompt if prompt[-len(query) :] == query else [*prompt, *query]
    answers = chosen[shared:], rejected[shared:]
    for answer in answers:
        if len(answer) != 1 or not isinstance(answer[0], dict) or answer[0].get("role") != "assistant":
            raise SkipRowError("chosen and rejected do not differ in one assistant message at their end")
    first, second = (answer[0].get("content") for answer in answers)
    if not isinstance(first, str) or not isinstance(second, str):
        raise SkipRowError("a message without text")
    return query, first, second


def _shared(first: Any, second: Any) -> int:
    """Return the length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
