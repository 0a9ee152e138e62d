"""Checked answers, by the real library, and what they do where a check never ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.recipes.demo.arithmetic import correct, held_out_problems, problems
from rrhf.records.record import Record
from rrhf.rewards import verifiable
from rrhf.rewards.scoring import score_records
from rrhf.rewards.verifiable import CHECKER, math_verify

pytest.importorskip("math_verify")
NAME = "rrhf.rewards.verifiable:math_verify"


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    CHECKER.close()


def checked(*pairs: tuple[str, Any]) -> list[float | None]:
    texts, answers = zip(*pairs, strict=True)
    return math_verify([""] * len(texts), list(texts), answer=list(answers))


def test_answers() -> None:
    assert checked(
        ("So it is $\\frac{1}{2}$.", "0.5"),
        ("The answer is 2", "0.5"),
        ("\\boxed{x^2 + 2x + 1}", "$(x+1)^2$"),
        ("$1 + x^2$", "x^2+1"),
        ("I do not know", "7"),
        ("It is 1,072.", "2 * 500 = 1000, and 72 more #### 1072"),
        ("It is blue.", "blue"),  # no mathematics
        ("7", ""),
        ("7", None),
        ("7", 7),
    ) == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, None, None, None, 1.0]


def test_a_check_that_never_ends_is_ended_outside_the_main_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiable, "SECONDS", 1.0)
    found: list[Any] = []
    work = [("$9^{9^{9^{9}}}$", "7"), ("7", "7"), ("7", "$9^{9^{9^{9}}}$"), ("7", "7")]
    thread = threading.Thread(target=lambda: found.extend(checked(*work)))
    thread.start()
    thread.join()
    assert found[:2] == [0.0, 1.0]  # and the next one is checked
    assert found[2] in (None, 0.0)  # what is said of an answer of nobody's size
    assert found[3] == 1.0


def test_a_process_that_was_killed_is_started_again() -> None:
    assert checked(("7", "7")) == [1.0]
    assert CHECKER._process is not None
    CHECKER._process.kill()
    CHECKER._process.wait()
    assert checked(("7", "7")) == [1.0]


def test_as_a_reward() -> None:
    asked = [{"role": "user", "content": "2 + 5?"}]
    records = [
        Record(query="2 + 5 =", responses=[" 7", " 8"], extra={"answer": "7"}),
        Record(query=asked, responses=["It is $7$."], extra={"answer": "7"}),
    ]
    assert [record.scores for record in score_records(records, [NAME])] == [[1.0, 0.0], [1.0]]
    (record,) = score_records([Record(query="q", responses=["7"], extra={"solution": "so #### 7"})], [NAME])
    assert record.scores == [1.0]
    mixed = [*records[:1], Record(query="q", responses=["7"], extra={"solution": "so #### 7"})]
    assert [record.scores for record in score_records(mixed, [NAME])] == [[1.0, 0.0], [1.0]]
    with pytest.raises(UserError, match="asks for the column 'answer'"):
        list(score_records([Record(query="q", responses=["7"])], [NAME]))


def test_the_worked_example_agrees_with_the_library() -> None:
    first, *_ = problems(limit=1)
    assert first.responses == [f" {first.extra['answer']}"]
    assert eval(first.query.rpartition("\n")[2].removesuffix("=")) == int(first.extra["answer"])  # type: ignore[union-attr]
    texts = [" 7", " 8", " 7 ", " 07", " seven", " -7", " 7."]
    answers = ["7"] * len(texts)
    assert correct([""] * 7, texts, answers) == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    assert math_verify([""] * 7, texts, answers) == correct([""] * 7, texts, answers)
    assert {record.id for record in problems()}.isdisjoint(record.id for record in held_out_problems())
    assert len(list(held_out_problems())) == 128
