"""Questions and the answers of systems to them, from files."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rrhf.common.errors import UserError
from rrhf.evaluation.pairwise.comparisons import Question
from rrhf.records.files import read_records
from rrhf.records.formats import load_dataset_records
from rrhf.records.record import Record, asked_text

log = logging.getLogger("rrhf")


class _First(NamedTuple):
    """The first response of a record, where it came from, and of how many it is the first."""

    text: str
    source: str
    of: int


def read_questions(path: Path) -> list[Question]:
    """The questions of a record file, or of one in another known layout, such as Vicuna's.

    Raises:
        UserError: the file cannot be read, is empty, or has an id twice.
    """
    questions = []
    for record in load_dataset_records(str(path)):
        questions.append(Question(record.id, asked_text(record.query), str(record.extra.get("category") or "")))
    if not questions:
        raise UserError(f"{path}: there is no question")
    if len({question.id for question in questions}) < len(questions):
        raise UserError(f"{path}: an id stands there twice: give each question its own")
    return questions


def answers_to(questions: list[Question], path: Path) -> dict[str, str]:
    """Question id → the first response of the record with the same query; of several, of that with the same id.

    A lone user message is the same query as its text. An id alone is none: files that count their lines share ids. An
    empty response is an answer, and the log says how many there are.

    Raises:
        UserError: the file cannot be read, or questions have no answer in it; the first are named.
    """
    return _texts(_first_responses(questions, path))


def answers_of_both(questions: list[Question], a: Path, b: Path) -> tuple[dict[str, str], dict[str, str]]:
    """``answers_to`` of two systems' files; where records have several responses, the log says which are taken.

    Raises:
        UserError: see ``answers_to``; or both files begin with the same responses, which the data set provided.
    """
    ours, theirs = (_first_responses(questions, path) for path in (a, b))
    for path, found in ((a, ours), (b, theirs)):
        taken = Counter(first.source for first in found.values() if first.of > 1)
        if taken:
            named = ", ".join(f"{source} ({count})" for source, count in taken.most_common(3))
            log.warning(f"{path}: {taken.total()} answers are the first of several responses to the query: {named}")
    if all(_is_one(ours[name], theirs[name]) for name in ours):
        source = next(iter(ours.values())).source
        raise UserError(
            f"{a} and {b}: the first response to every question is the same in both, of source {source!r}: nothing to "
            "compare. `rrhf sample` keeps the responses that its data bring, before its own: take them out with "
            "`rrhf convert QUERIES --queries_only --output F`, and sample both systems from that file"
        )
    return _texts(ours), _texts(theirs)


def _first_responses(questions: list[Question], path: Path) -> dict[str, _First]:
    by_id: dict[tuple[str, str], _First] = {}
    by_query: dict[str, _First] = {}
    for record in read_records(path, require="query"):
        if not record.responses:
            continue
        asked = asked_text(record.query)
        by_id[record.id, asked] = by_query[asked] = _first_of(record)
    found = {q.id: by_id.get((q.id, q.query), by_query.get(q.query)) for q in questions}
    missing = [name for name, first in found.items() if first is None]
    if missing:
        other = ", under whose id another query stands there" if missing[0] in {name for name, _ in by_id} else ""
        raise UserError(
            f"{path}: {len(missing)} of {len(questions)} questions have no answer there, such as {missing[0]!r}"
            f'{other}: answer all, with the question\'s whole query; where a system said nothing, "responses": [""]'
        )
    known = {name: first for name, first in found.items() if first is not None}
    silent = [name for name, first in known.items() if not first.text.strip()]
    if silent:
        log.warning(
            f"{path}: {len(silent)} answers are empty, such as that to {silent[0]!r}: they are judged as they are"
        )
    return known


def _texts(found: dict[str, _First]) -> dict[str, str]:
    return {name: first.text for name, first in found.items()}


def _first_of(record: Record) -> _First:
    source, _, _ = (record.sources or [""])[0].partition("|")  # equal responses were merged
    return _First(record.responses[0], source, len(record.responses))


def _is_one(a: _First, b: _First) -> bool:
    """Whether two files' answers are one response that both have; where each has one, two systems may well agree."""
    return (a.text, a.source) == (b.text, b.source) and max(a.of, b.of) > 1
