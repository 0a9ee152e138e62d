"""Judge two systems by one judge or several, with the controls that say what the judges' numbers are worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from rrhf.evaluation.pairwise.comparisons import Comparison, Question, compare
from rrhf.evaluation.pairwise.statistics import agreement, describe, strengths
from rrhf.records.record import Record
from rrhf.rewards.judges.judge import Judge

# What the null model answers to every question. A judge that often prefers it to real answers measures something else.
NULL_ANSWER = "Thank you for your question. I hope that this answer is helpful, and please ask if anything is unclear."


def judge_pair(
    judges: Mapping[str, Judge],
    questions: Sequence[Question],
    a: Mapping[str, str],
    b: Mapping[str, str],
    *,
    null_answer: str = NULL_ANSWER,
    seed: int = 0,
    samples: int = 500,
) -> tuple[dict[str, Any], dict[str, list[Comparison]]]:
    """Compare the answers of system a with those of system b (question id → text), judge by judge.

    Args:
        judges: name → judge.
        questions: each has an answer in ``a`` and in ``b``.
        null_answer: entered against b as the answer to every question: the null model.
        seed, samples: of the bootstraps over questions.

    Returns:
        The numbers: questions; judges: name → what ``describe`` says of a against b, null_model (its answer, and what
        is said of it against b), strengths of a, b and null_model, replies (in words); agreement: for each two judges.
        And judge → its comparisons of a and b, in the order of the questions.

    Raises:
        UserError, BudgetReached: see ``Judge.scores``; what was answered is kept, and the same call goes on.
    """
    result: dict[str, Any] = {"questions": len(questions), "judges": {}, "agreement": {}}
    said: dict[str, list[Comparison]] = {}
    constant = dict.fromkeys(a, null_answer)
    for name, judge in judges.items():
        said[name] = compare(judge, questions, a, b)
        null = compare(judge, questions, constant, b)
        controlled = describe(null, seed, samples)
        result["judges"][name] = {
            **describe(said[name], seed, samples),
            "null_model": {
                "answer": null_answer,
                **{
                    key: controlled[key]
                    for key in ("n", "win", "tie", "lose", "win_rate", "length_controlled_win_rate")
                },
            },
            "strengths": strengths({("a", "b"): said[name], ("null_model", "b"): null}, seed, samples),
            "replies": judge.summary(asked_for=False),
        }
    for one, other in combinations(said, 2):
        result["agreement"][f"{one} / {other}"] = agreement(said[one], said[other], seed)
    return result, said


def comparison_records(
    questions: Sequence[Question],
    a: Mapping[str, str],
    b: Mapping[str, str],
    said: Mapping[str, Sequence[Comparison]],
) -> Iterator[Record]:
    """What the judges said of each question: a record with both answers, their summed scores as rewards.

    In the column ``comparisons`` stands, judge by judge, the outcome for a (None where an order was not judged) and the
    sums of both orders. ``scores`` are left out: the outcome of both orders is not always what the sums say.
    """
    for at, question in enumerate(questions):
        by_judge = {name: comparisons[at] for name, comparisons in said.items()}
        yield Record(
            question.query,
            [a[question.id], b[question.id]],
            sources=["a", "b"],
            rewards={
                f"judge:{name}": list(one.sums) if one.is_judged else [None] * 2 for name, one in by_judge.items()
            },
            id=question.id,
            extra={
                **({"category": question.category} if question.category else {}),
                "comparisons": {
                    name: {
                        "outcome": one.outcome if one.is_judged else None,
                        "a_first": one.a_first,
                        "b_first": one.b_first,
                    }
                    for name, one in by_judge.items()
                },
            },
        )
