"""The tests of raters: exact numbers, and how often they are wrong."""

from __future__ import annotations

from itertools import combinations

import pytest

from rrhf.arena.outcomes import by_unit, outcomes
from rrhf.arena.raters import agreement_with_others, check_counts, rater_checks, side_bias
from rrhf.arena.votes import Choice, Vote
from support.studies import SYSTEMS, careless, human, study

pytest.importorskip("scipy", reason="the extra `judging` is not installed")


def checks(*choices: Choice) -> list[Vote]:
    """The left response is the spoilt one."""
    return [Vote("r", str(i), str(i), "a", "b", choice, "", 0.0, False, "left") for i, choice in enumerate(choices)]


def test_attention_checks() -> None:
    votes = checks("right", "left", "tie", "skip", "right")
    assert check_counts(votes) == {"n": 4, "passed": 2}
    # P(two failures or more of four, each with 0.1) = 1 − 0.9⁴ − 4 · 0.1 · 0.9³
    assert rater_checks(votes, {})["r"]["p"] == pytest.approx(1 - 0.9**4 - 4 * 0.1 * 0.9**3)
    assert rater_checks(votes, {})["r"]["flags"] == []
    assert rater_checks(checks("left", "tie", "left"), {})["r"]["flags"] == ["random"]  # 0.001
    assert rater_checks(checks("right"), {})["r"]["p"] == 1.0


def test_agreement_with_the_others_against_all_ways_to_deal_the_labels() -> None:
    # On each of n things r contradicts s and t, who agree: r gets 0, the others 1/2. One way in 3ⁿ is as bad.
    units = {(str(i), "a", "b"): {"r": "win", "s": "lose", "t": "lose"} for i in range(4)}
    found = agreement_with_others("r", units, shuffles=40_000)
    assert found is not None and (found["n"], found["with_others"]) == (4, 0.0)
    assert found["p"] == pytest.approx(1 / 3**4, abs=0.003)
    other = agreement_with_others("s", units)
    assert other is not None and (other["with_others"], other["p"]) == (0.5, 1.0)
    assert agreement_with_others("r", {("1", "a", "b"): {"r": "win", "s": "lose"}}) is None  # of two nothing is told


def test_the_pairs_of_one_ranking_are_dealt_together() -> None:
    """Of k (k − 1) / 2 pairs that hang together chance is that of one: else who reads is flagged too often."""
    orders = {"r": "dcba", "s": "abcd", "t": "abcd"}
    units = {
        (f"q{i}", a, b): {name: "win" if order.index(a) < order.index(b) else "lose" for name, order in orders.items()}
        for i in range(2)
        for a, b in combinations("abcd", 2)
    }
    found = agreement_with_others("r", units, shuffles=40_000)
    assert found is not None and (found["n"], found["with_others"]) == (12, 0.0)
    assert found["p"] == pytest.approx(1 / 3**2, abs=0.006)


def test_left_and_right() -> None:
    def votes(left: int, right: int) -> list[Vote]:
        sides: list[Choice] = [*["left"] * left, *["right"] * right, "tie", "skip"]  # type: ignore[list-item]
        return [Vote("r", str(i), str(i), "a", "b", side, "", 0.0, False, None) for i, side in enumerate(sides)]

    found = side_bias([*votes(8, 2), *checks("left")])
    assert (found["left"], found["right"], found["share"]["mean"]) == (8, 2, 0.8)
    assert found["p"] == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert rater_checks(votes(8, 2), {})["r"]["flags"] == []
    assert rater_checks(votes(20, 2), {})["r"]["flags"] == ["one side"]
    assert side_bias(checks("left"))["p"] is None


def test_how_often_raters_are_flagged() -> None:
    """20 studies: nobody who reads is flagged more than once in 60; of those who do not, most are."""
    honest = caught = 0
    for seed in range(20):
        minds = {"anna": human(seed), "ben": human(seed), "cleo": human(seed) if seed % 2 else careless}
        votes = study(minds, seed)
        found = rater_checks(votes, by_unit(outcomes(votes, [], SYSTEMS)), seed)
        for name, said in found.items():
            if minds[name] is careless:
                caught += bool(said["flags"])
            else:
                honest += bool(said["flags"])
    assert honest <= 1 and caught >= 7
