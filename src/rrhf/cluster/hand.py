"""What a process of the pool does with what it is sent; it runs on the cluster's nodes."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.cluster.ladder import Outcome, Unit
from rrhf.common.errors import FailedError, UserError
from rrhf.common.imports import last_line
from rrhf.records.elsewhere import Answer
from rrhf.records.record import Record, record_from_row, record_line

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]


class Hand:
    """Answers units, a batch of one row each; what it opens (a model) it holds until its process ends.

    Args:
        opened: makes what answers.
        folder: where the command runs; the work is done there too, where this machine has such a folder, so that
            relative names mean the same.
    """

    def __init__(self, opened: Callable[[], Answer], folder: str) -> None:
        self.opened = opened
        self.answer: Answer | None = None
        if Path(folder).is_dir():
            os.chdir(folder)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (row,) = batch.to_pylist()
        try:
            if self.answer is None:
                self.answer = self.opened()
            answer = written(outcome_of(self.answer, records_of(row)))
        except UserError as error:
            answer = json.dumps({"refused": f"{error} (on the node {platform.node()})"})
        return answer_table(row, answer)


def outcome_of(answer: Answer, block: list[Record]) -> Outcome:
    """Answer records; after a failure what is done is kept, and the others are tried one by one.

    Raises:
        UserError: what trying again cannot mend.
    """
    made: dict[int, Record] = {}
    counts: Counter[str] = Counter()
    failure = _into(made, answer(list(block), counts), range(len(block)))
    failed: dict[int, str] = {}
    for index, record in enumerate(block):
        if index not in made:
            if len(block) > 1:
                failure = _into(made, answer([record], counts), [index])
            if index not in made:
                failed[index] = failure or "it was left out"
    return Outcome(made, failed, counts)


def _into(made: dict[int, Record], answers: Iterator[tuple[int, Record]], places: range | list[int]) -> str | None:
    """Collect answers as long as they come; why they ended too early, if they did."""
    try:
        for index, record in answers:
            made[places[index]] = record
    except FailedError as error:
        return str(error)
    except UserError:
        raise
    except Exception as error:
        return last_line(error)
    return None


# -- rows: a unit, with what it is made of or what came of it


def unit_table(unit: Unit, records: list[Record]) -> pa.Table:
    return _table(unit, "records", "\n".join(map(record_line, records)))


def answer_table(row: Row, answer: str) -> pa.Table:
    return _table(unit_of(row), "answer", answer)


def _table(unit: Unit, column: str, text: str) -> pa.Table:
    import pyarrow as pa

    columns = {name: pa.array([value], pa.int64()) for name, value in unit._asdict().items()}
    return pa.table({**columns, column: pa.array([text], pa.large_string())})


def unit_of(row: Row) -> Unit:
    return Unit(*(int(row[name]) for name in Unit._fields))


def records_of(row: Row) -> list[Record]:
    lines = row["records"].split("\n") if row["records"] else []
    return [record_from_row(json.loads(line), f"part {row['number']}") for line in lines]


def written(outcome: Outcome) -> str:
    made = {index: record_line(record) for index, record in outcome.made.items()}
    return json.dumps({"made": made, "failed": outcome.failed, "counts": outcome.counts})


def outcome_in(row: Row) -> Outcome:
    """What came of a unit. Raises ``UserError`` where the work was refused."""
    answer = json.loads(row["answer"])
    if "refused" in answer:
        raise UserError(answer["refused"])
    made = {int(i): record_from_row(json.loads(line), f"part {row['number']}") for i, line in answer["made"].items()}
    return Outcome(made, {int(i): why for i, why in answer["failed"].items()}, Counter(answer["counts"]))
