"""Questions and the answers of systems to them, from files."""

from __future__ import annotations

from pathlib import Path

from rrhf.common.errors import UserError
from rrhf.evaluation.pairwise.comparisons import Question
from rrhf.records.files import read_records
from rrhf.records.formats import load_dataset_records
from rrhf.records.record import query_text


def read_questions(path: Path) -> list[Question]:
    """The questions of a record file, or of one in another known layout, such as Vicuna's.

    Raises:
        UserError: the file cannot be read, is empty, or has an id twice.
    """
    questions = []
    for record in load_dataset_records(str(path)):
        text = record.query if isinstance(record.query, str) else record.query[-1]["content"]
        shown = text if isinstance(record.query, str) or len(record.query) == 1 else query_text(record.query)
        questions.append(Question(record.id, shown, str(record.extra.get("category") or "")))
    if not questions:
        raise UserError(f"{path}: there is no question")
    if len({question.id for question in questions}) < len(questions):
        raise UserError(f"{path}: an id stands there twice: give each question its own")
    return questions


def answers_to(questions: list[Question], path: Path) -> dict[str, str]:
    """Question id → the first response of the record with the same id, or else with the same query.

    Raises:
        UserError: the file cannot be read, or questions have no answer in it; the first are named.
    """
    by_id: dict[str, str] = {}
    by_query: dict[str, str] = {}
    for record in read_records(path, require="responses"):
        by_id[record.id] = record.responses[0]
        messages = record.query
        by_query[messages if isinstance(messages, str) else messages[-1]["content"]] = record.responses[0]
    found = {q.id: by_id.get(q.id, by_query.get(q.query)) for q in questions}
    missing = [name for name, text in found.items() if text is None]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(questions)} questions have no answer there, such as {missing[0]!r}: "
            "answer all, with the question's id or query"
        )
    return {name: text for name, text in found.items() if text is not None}
