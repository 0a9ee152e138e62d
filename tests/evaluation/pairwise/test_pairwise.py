"""Judging in pairs: outcomes of both orders, rates with hand-worked numbers, controls, and a judge at a real server."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rrhf.evaluation.pairwise.comparisons import Comparison, Question, compare
from rrhf.evaluation.pairwise.judging import NULL_ANSWER, judge_pair
from rrhf.evaluation.pairwise.statistics import agreement, describe, length_controlled_win_rate, strengths
from rrhf.rewards.judges.judge import Judge
from rrhf.rewards.judges.template import JudgeTemplate
from support import misbehaving as bad

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")
pytest.importorskip("choix", reason="the extra `judging` is not installed")

WIN, TIE, LOSE = (9.0, 5.0), (7.0, 7.0), (4.0, 8.0)


def said(first: Any, second: Any, name: str = "q", category: str = "", lengths: tuple[int, int] = (5, 5)) -> Comparison:
    return Comparison(name, category, first, second, lengths)


@pytest.mark.parametrize(
    ("first", "second", "outcome", "flipped"),
    [
        (WIN, WIN, "win", False),
        (WIN, TIE, "win", False),
        (TIE, TIE, "tie", False),
        (WIN, LOSE, "tie", True),
        (LOSE, WIN, "tie", True),
        (TIE, LOSE, "lose", False),
        (LOSE, LOSE, "lose", False),
        ((0.1 + 0.2, 5.0), (0.3, 0.1 + 0.2), "lose", False),  # the second is equal but for its last bit
    ],
)
def test_the_outcome_of_both_orders(first: Any, second: Any, outcome: str, flipped: bool) -> None:
    assert (said(first, second).outcome, said(first, second).is_flipped) == (outcome, flipped)


def test_the_numbers_of_a_judge() -> None:
    comparisons = [
        said(WIN, WIN, "1", "maths", (30, 10)),
        said(WIN, LOSE, "2", "maths", (10, 10)),
        said(LOSE, LOSE, "3", "prose", (10, 50)),
        said(TIE, WIN, "4", "prose", (20, 10)),
        said(WIN, None, "5", "prose", (20, 10)),
    ]
    numbers = describe(comparisons, samples=20)
    assert (numbers["n"], numbers["unjudged"]) == (4, 1)
    assert (numbers["win"], numbers["tie"], numbers["lose"]) == (2, 1, 1)
    assert numbers["win_rate"]["mean"] == 0.625 and numbers["win_rate"]["low"] < 0.625 < numbers["win_rate"]["high"]
    assert numbers["position_flip_rate"]["mean"] == 0.25
    # The first one shown: wins, loses; wins, wins; loses, wins; a tie, loses.
    assert numbers["first_position_win_rate"]["mean"] == (1 + 0 + 1 + 1 + 0 + 1 + 0.5 + 0) / 8
    sums = numbers["summed_scores"]
    assert (sums["a"], sums["b"]) == (9 + 6.5 + 4 + 8, 5 + 6.5 + 8 + 6)
    assert sums["difference"]["mean"] == 2.0 and -16 <= sums["difference"]["low"] < 2 < sums["difference"]["high"] <= 16
    assert numbers["mean_length"] == {"a": 17.5, "b": 20.0}
    maths = numbers["categories"]["maths"]
    assert (maths["win_rate"]["mean"], maths["position_flip_rate"]["mean"]) == (0.75, 0.5)
    assert (maths["summed_scores"]["a"], maths["summed_scores"]["b"]) == (15.5, 11.5)
    assert numbers["categories"]["prose"] == {**numbers["categories"]["prose"], "n": 2, "win": 1, "tie": 0, "lose": 1}
    nothing = describe([said(None, None)])
    assert (nothing["n"], nothing["unjudged"], nothing["win_rate"], nothing["summed_scores"]) == (0, 1, None, None)


def naive_rate(values: list[float], differences: list[float]) -> float:
    """The length model by a plain search over θ and φ."""
    spread = float(np.std(differences)) or 1.0
    best = (math.inf, 0.0)
    for theta, phi in itertools.product(np.linspace(-2, 2, 161), np.linspace(-4, 4, 161)):
        loss = (theta**2 + phi**2) / 20
        for value, difference in zip(values, differences):
            score = theta + phi * math.tanh(difference / spread)
            loss += math.log1p(math.exp(-score)) * value + math.log1p(math.exp(score)) * (1 - value)
        best = min(best, (loss, float(theta)))
    return 1 / (1 + math.exp(-best[1]))


def test_the_rate_at_equal_length() -> None:
    values, differences = [1.0, 1.0, 0.0, 0.5, 1.0, 0.0], [30.0, 10.0, 20.0, -5.0, 40.0, -30.0]
    rate = length_controlled_win_rate(values, differences, samples=5)
    assert rate["mean"] == pytest.approx(naive_rate(values, differences), abs=0.01)
    assert rate["mean"] < sum(values) / len(values)  # a's answers are longer, and that is taken out


def test_the_rate_is_a_number_where_nothing_can_be_fitted() -> None:
    for values, differences in [
        ([1.0] * 20, list(range(20))),  # all won
        ([0.0] * 20, [0.0] * 20),  # all lost, all lengths equal
        ([1.0] * 10 + [0.0] * 10, [50.0] * 10 + [-50.0] * 10),  # length decides alone
        ([0.5], [3.0]),
    ]:
        rate = length_controlled_win_rate(values, differences, samples=5)
        assert 0 < rate["mean"] < 1 and all(map(math.isfinite, rate.values()))
    assert length_controlled_win_rate([1.0] * 20, [float(i) for i in range(20)], samples=2)["mean"] > 0.85
    decided = length_controlled_win_rate([1.0] * 10 + [0.0] * 10, [50.0] * 10 + [-50.0] * 10, samples=2)
    assert decided["mean"] == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ValueError, match="a length difference a value"):
        length_controlled_win_rate([], [])


def test_two_judges_side_by_side() -> None:
    one = [said(WIN, WIN, "1"), said(TIE, TIE, "2"), said(LOSE, LOSE, "3"), said(WIN, WIN, "4"), said(WIN, None, "5")]
    other = [said(WIN, WIN, "1"), said(WIN, WIN, "2"), said(WIN, WIN, "3"), said(WIN, WIN, "4"), said(WIN, WIN, "5")]
    found = agreement(one, other)
    assert (found["n"], found["same"]["mean"], found["not_contradicting"]["mean"]) == (4, 0.5, 0.75)
    assert found["same"]["low"] < 0.5 < found["same"]["high"]
    assert found["kappa"] == pytest.approx(0.0)  # (0.5 − 0.5) / (1 − 0.5): no better than chance
    assert agreement(one, one)["kappa"] == 1.0
    whole = {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert agreement(other, other) == {"n": 5, "same": whole, "not_contradicting": whole, "kappa": None}
    assert agreement(one, [])["n"] == 0


def test_strengths_of_systems() -> None:
    # 3 : 1 between a and b is a difference of ln 3, up to the penalty; c always loses to b and has a strength.
    a_b = [said(WIN, WIN, str(i)) for i in range(60)] + [said(LOSE, LOSE, str(i)) for i in range(60, 80)]
    c_b = [said(LOSE, LOSE, str(i)) for i in range(80)]
    found = strengths({("a", "b"): a_b, ("c", "b"): c_b}, samples=30)
    assert found["a"]["mean"] - found["b"]["mean"] == pytest.approx(math.log(3), abs=0.05)
    assert found["a"]["mean"] > found["b"]["mean"] > found["c"]["mean"] > -20
    assert all(found[name]["low"] <= found[name]["mean"] <= found[name]["high"] for name in "abc")
    ties = strengths({("a", "b"): [said(TIE, TIE, str(i)) for i in range(5)]}, samples=5)
    assert ties["a"] == pytest.approx({"mean": 0.0, "low": 0.0, "high": 0.0}, abs=1e-9)
    assert strengths({("a", "b"): []}) == {}


# --- at a server -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[bad.Misbehaving]:
    with bad.misbehaving() as running:
        yield running


def scores_by(rule: Any) -> bad.Behaviour:
    """A judge that gives each of two responses the score of ``rule(place, text)``."""

    def behave(handler: bad.Handler, body: dict[str, Any]) -> None:
        texts = re.findall(r"Response \d+:\n<<begin .*>>\n(.*)\n<<end", body["messages"][-1]["content"])
        lines = [f"Response {place}: Merit: {rule(place, text)}" for place, text in enumerate(texts, 1)]
        handler.send_json(bad.answer(body, ["\n".join(lines)]))

    return behave


def judge(server: bad.Misbehaving, folder: Path | None = None) -> Judge:
    template = JudgeTemplate(
        url=server.url, model="m", prompt="{query}\n{responses}", aspects=("Merit",), range=(1, 9), json="never"
    )
    return Judge(template, folder=folder)


QUESTIONS = [Question(f"q{i}", f"Question {i}?", "even" if i % 2 == 0 else "odd") for i in range(6)]
A = {question.id: "long and good " * 3 for question in QUESTIONS}
B = {question.id: "short" for question in QUESTIONS}


def test_both_orders_are_asked_and_nothing_twice(server: bad.Misbehaving, tmp_path: Path) -> None:
    server.default = scores_by(lambda place, text: min(9, len(text) // 5))
    comparisons = compare(judge(server, tmp_path), QUESTIONS, A, B)
    assert all(c.a_first == c.b_first == (8.0, 1.0) and c.outcome == "win" for c in comparisons)
    assert len(server.posts) == 1 + 2 * len(QUESTIONS)  # a check, and both orders
    server.posts.clear()
    assert compare(judge(server, tmp_path), QUESTIONS, A, B) == comparisons
    assert server.posts == []


def test_a_judge_that_likes_the_first_place_is_found_out(server: bad.Misbehaving) -> None:
    server.default = scores_by(lambda place, text: 8 if place == 1 else 3)
    numbers = describe(compare(judge(server), QUESTIONS, A, B), samples=5)
    assert (numbers["position_flip_rate"]["mean"], numbers["first_position_win_rate"]["mean"]) == (1.0, 1.0)
    assert (numbers["win"], numbers["tie"], numbers["lose"]) == (0, 6, 0)


def test_two_judges_with_the_null_model(server: bad.Misbehaving) -> None:
    with bad.misbehaving() as other:
        server.default = scores_by(lambda place, text: min(9, len(text) // 5))  # falls for the null model
        other.default = scores_by(lambda place, text: 9 if "good" in text else 5 if "short" in text else 1)
        found, each = judge_pair({"length": judge(server), "merit": judge(other)}, QUESTIONS, A, B, samples=5)
    assert found["questions"] == 6 and [c.outcome for c in each["merit"]] == ["win"] * 6
    length, merit = found["judges"]["length"], found["judges"]["merit"]
    assert length["win_rate"]["mean"] == merit["win_rate"]["mean"] == 1.0
    assert (length["null_model"]["win_rate"]["mean"], merit["null_model"]["win_rate"]["mean"]) == (1.0, 0.0)
    assert length["null_model"]["answer"] == NULL_ANSWER
    assert set(length["categories"]) == {"even", "odd"}
    apart = {"mean": 24.0, "low": 24.0, "high": 24.0}
    assert merit["summed_scores"] == {"a": 54.0, "b": 30.0, "difference": apart}
    assert merit["strengths"]["a"]["mean"] > merit["strengths"]["b"]["mean"] > merit["strengths"]["null_model"]["mean"]
    assert "24 of 24 calls scored" in merit["replies"]
    agreed = found["agreement"]["length / merit"]
    assert (agreed["n"], agreed["same"]["mean"], agreed["kappa"]) == (6, 1.0, None)


def test_unread_replies_leave_a_question_out(server: bad.Misbehaving) -> None:
    def rule(place: int, text: str) -> Any:
        return "unsure" if text == "short" and place == 1 else 5

    server.default = scores_by(rule)
    numbers = describe(compare(judge(server), QUESTIONS[:2], A, B), samples=2)
    assert (numbers["n"], numbers["unjudged"], numbers["win_rate"]) == (0, 2, None)
