"""Rated responses: several to a query, with a score or a rating by aspect each, which stand in ``rewards`` by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rrhf.common.errors import UserError
from rrhf.records.foreign.pairs import preference
from rrhf.records.foreign.rows import (
    PAIR_RATINGS,
    ForeignRow,
    SkipRowError,
    chosen_row,
    grouped,
    number_of,
    text_of,
    unused,
    user,
    value_of,
)
from rrhf.records.record import Query, Record

Scores = list[float | None]


def weighted(record: Record, weights: Mapping[str, float]) -> Record:
    """The record scored by Σ weight · rating over the named ``rewards``; None where one of them is.

    Raises:
        UserError: it lacks one of them.
    """
    if missing := sorted(set(weights) - set(record.rewards)):
        raise UserError(
            f"record {record.id!r} has no rating {missing[0]!r} to weigh (it has {', '.join(record.rewards) or 'none'})"
        )
    columns = [[(weight, value) for value in record.rewards[name]] for name, weight in weights.items()]
    scores = [
        None if any(value is None for _, value in terms) else math.fsum(weight * value for weight, value in terms)
        for terms in zip(*columns)
    ]
    kept = {name: values for name, values in record.rewards.items() if name != "provided"}  # the scores before these
    return replace(record, scores=scores, rewards=kept)


def _mean(values: Sequence[float | None]) -> float | None:
    rated = [value for value in values if value is not None]
    return math.fsum(rated) / len(rated) if rated else None


def _answers(row: ForeignRow, name: str) -> list[ForeignRow]:
    """The responses of a row, each an object with a text ``response``; one without text is an empty response."""
    answers = value_of(row, name)
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise SkipRowError(f"`{name}` is no list of objects")
    texts = (answer.get("response") for answer in answers)
    return [{**answer, "response": text if isinstance(text, str) else ""} for answer, text in zip(answers, texts)]


def _system(answer: ForeignRow, name: str, index: int) -> str:
    return f"system/{answer[name]}" if isinstance(answer.get(name), str) else f"system/{index}"


def ultrafeedback(row: ForeignRow) -> ForeignRow:
    """UltraFeedback: ``instruction`` and ``completions`` with ``response`` and ``model``; scored by its mean rating.

    ``rewards`` has ``overall_score``, ``fine-grained_score`` (the mean of the aspects' ratings, computed where it is
    not given) and each aspect's rating. ``scores`` is the fine-grained one, since earlier versions have an overall
    score of 10 in place of 1; it is the overall one where no aspect is rated. System prompts, critiques and rationales
    stay behind.
    """
    answers = _answers(row, "completions")
    ratings = [_aspects(answer.get("annotations")) for answer in answers]
    aspects = dict.fromkeys(aspect for rated in ratings for aspect in rated)
    given = [number_of(answer.get("fine-grained_score")) for answer in answers]
    fine = [_mean(list(rated.values())) if mean is None else mean for mean, rated in zip(given, ratings)]
    overall = [number_of(answer.get("overall_score")) for answer in answers]
    rewards: dict[str, Scores] = {"overall_score": overall, "fine-grained_score": fine}
    rewards |= {aspect: [rated.get(aspect) for rated in ratings] for aspect in aspects}
    return {
        **unused(row, "instruction", "completions", "models"),
        "query": user(text_of(row, "instruction")),
        "responses": [answer["response"] for answer in answers],
        "sources": [_system(answer, "model", index) for index, answer in enumerate(answers)],
        "scores": overall if all(score is None for score in fine) else fine,
        "rewards": rewards,
    }


def _aspects(annotations: Any) -> dict[str, float | None]:
    """Aspect → its rating, of ``{"helpfulness": {"Rating": "4", …}, …}``."""
    if not isinstance(annotations, dict):
        return {}
    held = {aspect: note[0] if isinstance(note, list) and note else note for aspect, note in annotations.items()}
    return {aspect: number_of(note.get("Rating")) for aspect, note in held.items() if isinstance(note, dict)}


# The names under which the systems of a pair stand: chosen, rejected.
PAIR_MODELS = (("chosen-model", "rejected-model"), ("chosen_model", "rejected_model"))


def ultrafeedback_binarized(row: ForeignRow) -> ForeignRow:
    """UltraFeedback as pairs (Argilla's, Zephyr's): a chosen and a rejected response with a rating each, its score."""
    names = next((names for names in PAIR_RATINGS if row.get(names[0]) is not None), PAIR_RATINGS[0])
    ratings = [number_of(value_of(row, name)) for name in names]
    if "chosen_response" in row:
        query = user(text_of(row, "instruction"))
        rest = unused(row, "instruction", "chosen_response", "rejected_response", *names)
        pair = chosen_row(query, text_of(row, "chosen_response"), text_of(row, "rejected_response"), rest)
    else:
        pair = preference({name: value for name, value in row.items() if name not in (*names, "messages")})
    models = [row.get(name) for name in next((n for n in PAIR_MODELS if row.get(n[0])), PAIR_MODELS[0])]
    named = [f"system/{model}" if model else source for model, source in zip(models, pair["sources"])]
    return {**pair, "scores": ratings, "sources": named}


def gpt4_llm(row: ForeignRow) -> ForeignRow:
    """GPT-4-LLM's comparisons: ``user_input``, and ``responses_and_scores`` or ``completion_a`` (better), ``…_b``."""
    query = user(text_of(row, "user_input"))
    if row.get("responses_and_scores") is None:
        rest = unused(row, "user_input", "completion_a", "completion_b")
        return chosen_row(query, text_of(row, "completion_a"), text_of(row, "completion_b"), rest)
    answers = _answers(row, "responses_and_scores")
    return {
        **unused(row, "user_input", "responses_and_scores"),
        "query": query,
        "responses": [answer["response"] for answer in answers],
        "sources": [_system(answer, "source", index) for index, answer in enumerate(answers)],
        "scores": [number_of(answer.get("score")) for answer in answers],
    }


TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _turns(prompt: str) -> Query:
    """HelpSteer2's dialogue, the first turn without its marker, as messages."""
    first, *others = TURN.split(prompt)
    turns = [("User", first), *zip(others[::2], others[1::2])]
    return [{"role": speaker.lower(), "content": content} for speaker, content in turns if content.strip()]


@grouped("prompt")
def helpsteer(row: ForeignRow) -> ForeignRow:
    """HelpSteer's attribute rows: ``prompt``, ``response``, numbers such as ``helpfulness``; scored by helpfulness.

    Rows in succession with one prompt are one record. Every column of numbers is an attribute and stands in
    ``rewards``; ``rrhf convert --weights`` makes another score of them.
    """
    prompt, rows = text_of(row, "prompt"), row["rows"]
    names = dict.fromkeys(name for answer in rows for name in answer if name not in ("prompt", "response", "id"))
    columns = {name: [answer.get(name) for answer in rows] for name in names}
    numbers = {name: [number_of(value) for value in values] for name, values in columns.items() if _numeric(values)}
    others: ForeignRow = {"id": rows[0]["id"]} if rows[0].get("id") is not None else {}
    others |= {
        name: values[0] if all(value == values[0] for value in values) else values
        for name, values in columns.items()
        if name not in numbers
    }
    texts = [answer.get("response") for answer in rows]
    return {
        **unused(others),
        "query": _turns(prompt),
        "responses": [text if isinstance(text, str) else "" for text in texts],
        "scores": numbers.get("helpfulness"),
        "rewards": numbers,
    }


def _numeric(values: Sequence[Any]) -> bool:
    """Whether a column has numbers and nothing else, where a cell of a table may be empty or hold them as text."""
    filled = [value for value in values if value is not None and value != ""]
    return bool(filled) and all(number_of(value) is not None for value in filled)
