"""Reward models and judges as raters of a study: what their scores say of the pairs that people saw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from rrhf.arena.outcomes import Unit
from rrhf.common.errors import UserError
from rrhf.evaluation.agreement import OUTCOMES, outcome_of
from rrhf.records.files import read_records
from rrhf.records.record import Query, Record, asked_text
from rrhf.rewards.logprob import SUM

Judged = dict[str, dict[Unit, str]]  # judge → what was shown → win, tie or lose of the first system
TURNED = dict(zip(OUTCOMES, reversed(OUTCOMES)))


def machine_labels(studied: Sequence[Record], files: Iterable[str | Path]) -> Judged:
    """What the machines of ``files`` say of each two responses of the study's records.

    A file holds scored records, as `rrhf score` writes them, or the comparisons of `rrhf judge`. Its records are found
    by their query, and by their id where several have that query, its responses by their text: a file a system is as
    good as one of all. Each reward of the records is a machine; ``scores`` are one where no reward is named. Equal
    texts are not compared.

    Args:
        studied: one record a query; ``sources`` are the systems, in the study's order.

    Raises:
        UserError: a file cannot be read, has nothing of the study, or says something else of a text, or of two, than
            was said before.
    """
    by_id = {record.id: record for record in studied}
    by_query = {asked_text(record.query): record for record in studied}
    judged: Judged = {}
    scores: dict[tuple[str, str], dict[str, float]] = {}  # machine, record → text → score
    for file in files:
        found = 0
        for record in read_records(file, require="responses"):
            asked = asked_text(record.query)
            own = by_id.get(record.id)
            if own is None or asked_text(own.query) != asked:
                own = by_query.get(asked)
            if own is None or not set(record.responses) & set(own.responses):
                continue
            found += 1
            for name, unit, label in _compared(record, own):
                if judged.setdefault(name, {}).setdefault(unit, label) != label:
                    raise UserError(
                        f"{file}: record {record.id!r}: {name} says {label} here and {judged[name][unit]} before, of "
                        "the same two texts: give one of the files"
                    )
            for name, text, score in _scored(record):
                before = scores.setdefault((name, own.id), {}).setdefault(text, score)
                if before != score:
                    raise UserError(
                        f"{file}: record {record.id!r}: {name} is {score} here and {before} before, for the same text: "
                        "give one of the files"
                    )
        if not found:
            raise UserError(f"{file}: none of its responses was shown in this study: score the study's own responses")
    for (name, record_id), known in scores.items():
        for unit, label in _from_scores(by_id[record_id], known):
            judged.setdefault(name, {}).setdefault(unit, label)
    return judged


def _pairs(own: Record) -> Iterator[tuple[Unit, str, str]]:
    for (a, first), (b, second) in combinations(zip(own.sources, own.responses, strict=True), 2):
        if first != second:
            yield (own.id, a, b), first, second


def _compared(record: Record, own: Record) -> Iterator[tuple[str, Unit, str]]:
    """The outcomes that `rrhf judge` wrote, for its first response against its second."""
    said = record.extra.get("comparisons")
    if not isinstance(said, Mapping) or len(record.responses) != 2:
        return
    for name, one in said.items():
        label = str(one.get("outcome")) if isinstance(one, Mapping) else ""
        if label in TURNED:
            for unit, first, second in _pairs(own):
                if [first, second] == record.responses:
                    yield f"judge:{name}", unit, label
                elif [second, first] == record.responses:
                    yield f"judge:{name}", unit, TURNED[label]


def _scored(record: Record) -> Iterator[tuple[str, str, float]]:
    """Machine, text and score; sums of log-probabilities, which are kept for KL, are no machine's."""
    rewards = {name: values for name, values in record.rewards.items() if not name.startswith(f"{SUM}:")}
    for name, values in (rewards or {"scores": record.scores}).items():
        for text, score in zip(record.responses, values):
            if score is not None:
                yield name, text, score


def _from_scores(own: Record, known: Mapping[str, float]) -> Iterator[tuple[Unit, str]]:
    for unit, first, second in _pairs(own):
        if first in known and second in known:
            yield unit, outcome_of(known[first], known[second])


def study_records(texts: Mapping[str, tuple[Query, Mapping[str, str]]], systems: Sequence[str]) -> list[Record]:
    """One record a query, its responses in the order of ``systems``, which are its sources.

    Args:
        texts: record id → the query, and system → response.
    """
    found = []
    for record_id, (query, responses) in texts.items():
        shown = [name for name in systems if name in responses]
        found.append(Record(query, [responses[name] for name in shown], sources=shown, id=record_id))
    return found
