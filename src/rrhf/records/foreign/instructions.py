"""Instructions and prompts: queries alone, with one response, or with those of several systems; no scores."""

from __future__ import annotations

from rrhf.records.foreign.rows import ForeignRow, SkipRowError, text_of, unused, user, value_of, with_system
from rrhf.records.record import Message, Query

PROMPT_COLUMNS = ("prompt", "query", "instruction", "question", "text")
INSTRUCTION = ("instruction", "input", "system", "history")  # what ``instruction_of`` reads


def instruction_of(row: ForeignRow) -> Query:
    """Alpaca's ``instruction``, with ``input`` below it where there is one, as one user message.

    In front of it stand, as LLaMA-Factory has them, a ``system`` prompt and the earlier turns of ``history``, pairs of
    what was asked and what was answered.
    """
    instruction = text_of(row, "instruction")
    detail = row.get("input")
    content = f"{instruction}\n\n{detail}" if isinstance(detail, str) and detail.strip() else instruction
    return with_system([*_earlier(row.get("history") or []), *user(content)], row)


def _earlier(history: object) -> list[Message]:
    messages: list[Message] = []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise SkipRowError("`history` is no list of pairs of texts")
        messages += [*user(turn[0]), {"role": "assistant", "content": turn[1]}]
    return messages


def alpaca(row: ForeignRow) -> ForeignRow:
    """Alpaca's ``instruction``, ``input``, ``output``: one user message, one response without a score."""
    return {
        **unused(row, *INSTRUCTION, "output"),
        "query": instruction_of(row),
        "responses": [text_of(row, "output")],
    }


def dolly(row: ForeignRow) -> ForeignRow:
    """Dolly's ``instruction``, ``context``, ``response``, read as Alpaca's three columns; others travel along."""
    details = [row[name] for name in ("context", "input") if row.get(name)]
    if len(details) > 1:
        raise SkipRowError("both `context` and `input`")
    return {
        **unused(row, *INSTRUCTION, "context", "response"),
        "query": instruction_of({**row, "input": details[0] if details else None}),
        "responses": [text_of(row, "response")],
    }


def alpacafarm(row: ForeignRow) -> ForeignRow:
    """``instruction``, ``input`` and ``outputs``, a mapping from system to text: sources ``system/<name>``."""
    outputs = value_of(row, "outputs")
    if not isinstance(outputs, dict):
        raise SkipRowError("`outputs` is no mapping from system to text")
    answers = {f"system/{name}": text for name, text in outputs.items() if text is not None}
    return {
        **unused(row, *INSTRUCTION, "outputs"),
        "query": instruction_of(row),
        "responses": list(answers.values()),
        "sources": list(answers),
    }


def vicuna(row: ForeignRow) -> ForeignRow:
    """The Vicuna questions: the first of ``turns`` is the query; ``question_id`` and ``category`` travel along."""
    turns = value_of(row, "turns")
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise SkipRowError("`turns` is no list of texts")
    used = ("turns",) if len(turns) == 1 else ()
    return {**unused(row, *used), "query": user(turns[0])}


def prompt_completion(row: ForeignRow) -> ForeignRow:
    """TRL's ``prompt`` and ``completion``, as text or messages: one response without a score."""
    prompt, completion = value_of(row, "prompt"), value_of(row, "completion")
    if isinstance(completion, list):
        if len(completion) != 1 or not isinstance(completion[0], dict) or completion[0].get("role") != "assistant":
            raise SkipRowError("`completion` is no assistant's message")
        completion = text_of(completion[0], "content")
    if not isinstance(completion, str):
        raise SkipRowError("`completion` is no text")
    rest = unused(row, "prompt", "completion", "system")
    return {**rest, "query": with_system(prompt, row), "responses": [completion]}


def imdb(row: ForeignRow) -> ForeignRow:
    """Reviews: ``text`` or ``review`` as a plain text query; the label travels along."""
    name = "text" if row.get("text") is not None else "review"
    return {**unused(row, name), "query": text_of(row, name)}


def prompts(row: ForeignRow) -> ForeignRow:
    """Queries alone, text or messages, in whichever of ``PROMPT_COLUMNS`` comes first; an instruction as Alpaca's."""
    for name in PROMPT_COLUMNS:
        if row.get(name) is not None:
            if name == "instruction" and isinstance(row[name], str):
                return {**unused(row, *INSTRUCTION), "query": instruction_of(row)}
            return {**unused(row, name, "system"), "query": with_system(row[name], row)}
    raise SkipRowError(f"none of the columns {', '.join(PROMPT_COLUMNS)}")
