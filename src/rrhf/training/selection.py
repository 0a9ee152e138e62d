"""Which of a record's responses train: ``--select``. Records stay as they are; training sees fewer of their responses.

A selection is a function from a record's scores, none of them missing, and a number N to the indices that stay; the
first line of its docstring describes it in ``--help`` and on model cards. A new one is one function and one line in
``SELECTIONS``. Equal scores are those of ``rrhf.common.scores``; of equals the first is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from rrhf.common.errors import UserError, nearest
from rrhf.common.scores import score_levels
from rrhf.records.record import Record

Selection = Callable[[Sequence[float], int], list[int]]


def every(scores: Sequence[float], number: int) -> list[int]:
    """every scored response."""
    return list(range(len(scores)))


def best_worst(scores: Sequence[float], number: int) -> list[int]:
    """the best and the worst."""
    levels = score_levels(scores)
    return sorted({levels.index(max(levels)), levels.index(0)})


def best_low(scores: Sequence[float], number: int) -> list[int]:
    """the best and the one nearest to μ − 2σ of the record's scores (arXiv 2502.16825), never one as good as the best.

    σ is over the record's own responses (divided by k). No score lies further below μ than σ √(k − 1), so up to k = 5
    this is the worst; where two are equally near, the lower one is taken.
    """
    levels = score_levels(scores)
    below = [index for index, level in enumerate(levels) if level < max(levels)]
    mean = math.fsum(scores) / len(scores)
    low = mean - 2 * math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    nearest_low = sorted(below, key=lambda index: (abs(scores[index] - low), levels[index], index))[:1]
    return sorted([levels.index(max(levels)), *nearest_low])


def top(scores: Sequence[float], number: int) -> list[int]:
    """the N best."""
    levels = score_levels(scores)
    return sorted(sorted(range(len(scores)), key=lambda index: -levels[index])[:number])


SELECTIONS: dict[str, Selection] = {"all": every, "best-worst": best_worst, "best-low": best_low, "top:N": top}


def describe_selection(selection: Selection) -> str:
    """The first line of a selection's docstring, without its full stop."""
    return (selection.__doc__ or "").strip().partition("\n")[0].removesuffix(".")


@cache
def find_selection(select: str) -> tuple[Selection, int]:
    """The function of ``SELECTIONS`` that ``--select`` names, and its N, which is 0 where it has none.

    Raises:
        UserError: there is no such selection, or N is no positive whole number.
    """
    name, _, number = select.partition(":")
    known = {form.partition(":")[0]: form for form in SELECTIONS}
    if name not in known:
        raise UserError(f"--select {select}: {nearest(name, list(known))}")
    takes_number = ":" in known[name]
    if takes_number != number.isdecimal() or (takes_number and int(number) < 1) or (number and not takes_number):
        raise UserError(f"--select {select}: write {known[name]}{', N at least 1' if takes_number else ''}")
    return SELECTIONS[known[name]], int(number or 0)


def selected(record: Record, select: str) -> Record:
    """The record with the responses that train; sources, rewards and id stay theirs. "all" leaves it as it is.

    Responses without a score are left out by every other selection, and count in none.
    """
    selection, number = find_selection(select)
    scored = [(index, score) for index, score in enumerate(record.scores) if score is not None]
    if selection is every or not scored:
        return record
    return record.keeping([scored[i][0] for i in selection([score for _, score in scored], number)])


@dataclass  # not frozen: RRHFConfig inherits it beside transformers' arguments, which are not
class SelectionSettings:
    """Which responses train."""

    select: str = field(
        default="all",
        metadata={
            "help": "which responses of a record train. "
            + ". ".join(f"{name}: {describe_selection(selection)}" for name, selection in SELECTIONS.items())
        },
    )

    def selection_faults(self) -> list[str]:
        """What is wrong with the settings, one sentence a fault."""
        try:
            find_selection(self.select)
        except UserError as error:
            return [str(error)]
        return []
