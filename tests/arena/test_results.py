"""What votes say, by hand-worked numbers and by studies whose raters' minds are known."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

import pytest

from rrhf.arena.results import live_results, study_results
from rrhf.arena.results_text import format_results, live_tables, markdown_results
from rrhf.arena.votes import Choice, Ranking, Vote
from support.studies import SYSTEMS, by_strengths, careless, human, study

pytest.importorskip("choix", reason="the extra `judging` is not installed")
pytest.importorskip("scipy", reason="the extra `judging` is not installed")


Side = Literal["left", "right"]


def vote(rater: str, query: str, left: str, right: str, choice: Choice, spoilt: Side | None = None) -> Vote:
    return Vote(rater, f"{query}-{left}-{right}", query, left, right, choice, "", 0.0, False, spoilt)


VOTES = [
    vote("r", "1", "a", "b", "left"),  # a wins
    vote("s", "1", "b", "a", "left"),  # b wins
    vote("t", "1", "b", "a", "right"),  # a wins
    vote("r", "2", "b", "a", "tie"),
    vote("r", "3", "b", "a", "left"),  # b wins
    vote("s", "4", "a", "b", "skip"),
    vote("s", "5", "a", "b", "right", spoilt="right"),  # fails a check
    vote("t", "6", "a", "c", "left"),
]


def test_a_query_counts_once_and_sides_are_undone() -> None:
    found = study_results(VOTES, samples=10)
    assert (found["systems"], found["votes"], found["skipped"], found["queries"]) == (["a", "b", "c"], 6, 1, 4)
    one, other = found["comparisons"]
    assert (one["a"], one["b"], one["queries"], one["votes"]) == ("a", "b", 3, 5)
    assert (one["win"], one["tie"], one["lose"]) == (2, 1, 2)
    shares = [one[f"{name}_share"]["mean"] for name in ("win", "tie", "lose")]
    assert shares == pytest.approx([(2 / 3) / 3, 1 / 3, (1 / 3 + 1) / 3])  # query 1 is two thirds of a win
    assert one["win_rate"]["mean"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert one["win_rate"]["low"] <= one["win_rate"]["mean"] <= one["win_rate"]["high"]
    assert (other["a"], other["b"], other["win"]) == ("a", "c", 1)
    assert found["strengths"]["b"]["mean"] > found["strengths"]["a"]["mean"] > found["strengths"]["c"]["mean"]
    live = live_results(VOTES, samples=10)
    assert live["votes"] == 6 and live["strengths"] == found["strengths"]
    assert [c["win"] for c in live["comparisons"]] == [2, 1]
    counts, strengths = live_tables(live)
    assert counts[2][0][:5] == ("a against b", "5", "2 (40.0%)", "1 (20.0%)", "2 (40.0%)")
    assert [row[0] for row in strengths[2]] == ["b", "a", "c"] and live_tables(live_results([])) == []
    # In the study's order, c against a is the same thing said the other way round.
    turned = study_results(VOTES, systems=["c", "b", "a"], samples=10)["comparisons"]
    assert [(c["a"], c["b"], c["win"], c["lose"]) for c in turned] == [("b", "a", 2, 2), ("c", "a", 0, 1)]


def test_agreement_of_raters_and_of_a_machine() -> None:
    machine = {("1", "a", "b"): "win", ("2", "a", "b"): "win", ("6", "a", "c"): "lose", ("9", "a", "b"): "win"}
    found = study_results(VOTES, judges={"rm": machine}, samples=5)["agreement"]
    # Only query 1 was judged twice: r and t say win, s says lose.
    assert (found["raters"]["n"], found["raters"]["same"]["mean"]) == (1, pytest.approx(1 / 3))
    assert (
        found["pairs"]["r / t"]["same"]["mean"] == 1.0 and found["pairs"]["r / s"]["not_contradicting"]["mean"] == 0.0
    )
    judged = found["judges"]["rm"]
    assert (judged["all raters"]["n"], judged["r"]["n"], judged["s"]["n"], judged["t"]["n"]) == (5, 2, 1, 2)
    assert judged["r"]["same"]["mean"] == 0.5 and judged["r"]["not_contradicting"]["mean"] == 1.0
    assert judged["all raters"]["same"]["mean"] == pytest.approx((2 / 3 + 0 + 0) / 3)


def test_a_ranking_counts_as_its_pairs() -> None:
    rankings = [Ranking("r", "1", {"a": 1, "b": 2, "c": 2}, 0.0), Ranking("s", "1", {"c": 1, "b": 2, "a": 3}, 0.0)]
    found = study_results([], rankings, samples=5)
    said = {(c["a"], c["b"]): (c["win"], c["tie"], c["lose"]) for c in found["comparisons"]}
    assert said == {("a", "b"): (1, 0, 1), ("a", "c"): (1, 0, 1), ("b", "c"): (0, 1, 1)}
    assert (found["rankings"], found["votes"], found["agreement"]["raters"]["n"]) == (2, 0, 3)
    assert "2 rankings on 1 queries by 2 raters; 0 skipped" in format_results(found)
    more = study_results([], rankings, skipped={"r": 3, "s": 1, "t": 1}, without=["s"], samples=5)
    assert (more["skipped"], more["raters"]["r"]["skipped"]) == (4, 3)


def test_whose_word_does_not_count() -> None:
    found = study_results(VOTES, without=["s"], samples=5)
    assert (found["comparisons"][0]["win"], found["comparisons"][0]["lose"], found["skipped"]) == (2, 1, 0)
    assert (found["left_out"], found["checks"]) == (["s"], {"n": 0, "passed": 0})
    assert found["raters"]["s"]["checks"] == {"n": 1, "passed": 0}  # examined all the same
    alone = study_results([vote("r", "1", "a", "b", "left"), vote("r", "2", "d", "c", "left")], samples=5)
    assert alone["unlinked"] == [["a", "b"], ["c", "d"]]
    assert alone["agreement"]["raters"] == dict.fromkeys(("same", "not_contradicting", "kappa", "krippendorff")) | {
        "n": 0
    }
    assert alone["raters"]["r"]["p"] is None and alone["flagged"] == []
    nothing = study_results([])
    assert (nothing["comparisons"], nothing["strengths"], nothing["sides"]["p"]) == ([], {}, None)
    assert format_results(nothing).startswith("0 votes")


def test_three_raters_recover_known_strengths() -> None:
    true = {"rrhf": 0.6, "ppo": 0.1, "good": -0.7}
    hits = 0
    for seed in range(3):
        votes = study({name: by_strengths(true) for name in ("anna", "ben", "cleo")}, seed, checks=0)
        strengths = live_results(votes, systems=SYSTEMS, seed=seed, samples=100)["strengths"]
        hits += sum(strengths[name]["low"] <= value <= strengths[name]["high"] for name, value in true.items())
        assert all(one["high"] - one["low"] < 0.5 for one in strengths.values())
    assert hits >= 8  # of 9 intervals of 95 %


def test_a_careless_rater_is_flagged_and_the_others_are_not() -> None:
    votes = study({"anna": human(0), "ben": human(0), "cleo": careless}, 0)
    found = study_results(votes, systems=SYSTEMS, samples=5)
    assert found["flagged"] == ["cleo"] and found["raters"]["cleo"]["flags"] == ["random"]
    assert found["raters"]["anna"]["agreement"]["n"] == 30 and found["checks"]["n"] == 15
    page = format_results(found)
    assert "cleo looks like somebody who does not read" in page and "--without cleo" in page
    assert "| anna / ben | 30 |" in markdown_results(found)
    assert json.loads(json.dumps(found)) == found
    lefty = [replace(v, choice="left") if v.rater == "ben" and v.spoilt is None else v for v in votes]
    sides = study_results(lefty, systems=SYSTEMS, samples=5)
    assert "one side" in sides["raters"]["ben"]["flags"] and sides["raters"]["anna"]["flags"] == []
    assert sides["raters"]["ben"]["sides"]["share"]["mean"] == 1.0 and sides["sides"]["p"] < 0.001
