"""Ask a judge about two answers to each question, in both orders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rrhf.evaluation.agreement import OUTCOMES, outcome_of, value_of
from rrhf.rewards.judges.judge import Call, Judge
from rrhf.rewards.judges.parse import Scores


@dataclass(frozen=True)
class Question:
    """What both systems were asked."""

    id: str
    query: str
    category: str = ""


@dataclass(frozen=True)
class Comparison:
    """What a judge said of one question's two answers, a and b.

    Attributes:
        id, category: the question's.
        a_first, b_first: the summed scores (of a, of b) where a, or b, was shown first; None where none was read.
        lengths: of both answers, in characters.
    """

    id: str
    category: str
    a_first: tuple[float, float] | None
    b_first: tuple[float, float] | None
    lengths: tuple[int, int]

    @property
    def is_judged(self) -> bool:
        """Whether both orders were judged; one alone would carry the judge's liking for a position."""
        return self.a_first is not None and self.b_first is not None

    def preferences(self) -> tuple[float, float]:
        """1 where a wins, 0.5 for a tie, 0 where b wins: with a shown first, with b shown first."""
        assert self.a_first is not None and self.b_first is not None
        return _preference(self.a_first), _preference(self.b_first)

    @property
    def sums(self) -> tuple[float, float]:
        """The summed scores of a and b, each order counting half."""
        assert self.a_first is not None and self.b_first is not None
        a, b = ((one + other) / 2 for one, other in zip(self.a_first, self.b_first, strict=True))
        return a, b

    @property
    def outcome(self) -> str:
        """Of both orders together: who is ahead in them; a win in one and a loss in the other are a tie."""
        return OUTCOMES[1 + (sum(self.preferences()) > 1) - (sum(self.preferences()) < 1)]

    @property
    def value(self) -> float:
        """The outcome as a number: 1 for a win of a, 0.5 for a tie, 0 for a loss."""
        return value_of(self.outcome)

    @property
    def is_flipped(self) -> bool:
        """Whether the judge names one winner in one order and the other one in the other."""
        one, other = self.preferences()
        return abs(one - other) == 1


def _preference(sums: tuple[float, float]) -> float:
    return value_of(outcome_of(*sums))


def compare(
    judge: Judge, questions: Sequence[Question], a: Mapping[str, str], b: Mapping[str, str]
) -> list[Comparison]:
    """Judge the answers ``a`` and ``b`` (question id → text) to each question, in both orders.

    Replies are in the judge's journal: a stopped comparison goes on where it was, and a repeated one costs nothing.

    Raises:
        UserError, BudgetReached: see ``Judge.scores``.
    """
    calls = [
        Call(question.id, question.query, (a[question.id], b[question.id]), order)
        for question in questions
        for order in ((0, 1), (1, 0))
    ]
    found = [_sums(scores) for scores in judge.scores(calls)]
    return [
        Comparison(q.id, q.category, one, other, (len(a[q.id]), len(b[q.id])))
        for q, one, other in zip(questions, found[::2], found[1::2], strict=True)
    ]


def _sums(scores: Scores | None) -> tuple[float, float] | None:
    if scores is None:
        return None
    a, b = (math.fsum(by_aspect.values()) for by_aspect in scores)
    return a, b
