"""Strengths against a plain search, and which systems they compare."""

from __future__ import annotations

import math

import pytest

from rrhf.evaluation.bradley_terry import bradley_terry, unlinked

pytest.importorskip("choix", reason="the extra `judging` is not installed")


def test_strengths_are_those_of_the_shares() -> None:
    # Of one pair σ(s_a − s_b) is the share that a won, ties half: 70 wins, 20 ties, 30 losses of 120.
    values = [1.0] * 70 + [0.5] * 20 + [0.0] * 30
    games = {str(i): [("a", "b", value)] for i, value in enumerate(values)}
    found = bradley_terry(games, samples=40)
    assert found["a"]["mean"] - found["b"]["mean"] == pytest.approx(math.log(80 / 40), abs=0.01)
    assert found["a"]["mean"] + found["b"]["mean"] == pytest.approx(0)
    assert found["a"]["low"] < found["a"]["mean"] < found["a"]["high"] == pytest.approx(-found["b"]["low"])
    assert bradley_terry(games, samples=40) == found
    assert bradley_terry({}) == {}


def test_strengths_go_by_way_of_others() -> None:
    games = {str(i): [("a", "b", float(i % 4 > 0)), ("b", "c", float(i % 4 > 0))] for i in range(200)}
    found = bradley_terry(games, samples=5)  # 3 : 1 twice
    assert found["a"]["mean"] - found["c"]["mean"] == pytest.approx(2 * math.log(3), abs=0.05)
    assert unlinked(games) == []
    assert unlinked({"1": [("a", "b", 1.0)], "2": [("d", "c", 1.0)], "3": [("b", "e", 0.5)]}) == [
        ["a", "b", "e"],
        ["c", "d"],
    ]
