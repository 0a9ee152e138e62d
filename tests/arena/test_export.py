"""Votes as scored records, and machines held against people."""

from __future__ import annotations

from pathlib import Path

import pytest

from rrhf.arena.export import voted_records
from rrhf.arena.machines import machine_labels, study_records
from rrhf.arena.votes import Ranking, Vote
from rrhf.common.errors import UserError
from rrhf.records.export import exported
from rrhf.records.record import Record, query_text
from support import tiny

STUDIED = study_records(
    {
        "1": ("Why?", {"b": "no", "a": "yes", "c": "so"}),
        "2": ([{"role": "user", "content": "How?"}], {"a": "thus", "b": "so"}),
        "3": ("Who?", {"a": "I", "b": "I"}),
    },
    ["a", "b", "c"],
)


def vote(rater: str, query: str, left: str, right: str, choice: str, spoilt: str | None = None) -> Vote:
    return Vote(rater, f"{query}{left}{right}", query, left, right, choice, "", 0.0, False, spoilt)  # type: ignore[arg-type]


VOTES = [
    vote("r", "1", "b", "a", "right"),  # a wins
    vote("s", "1", "a", "b", "left"),  # a wins
    vote("t", "1", "a", "b", "right"),  # b wins
    vote("r", "2", "b", "a", "tie"),
    vote("s", "1", "a", "c", "skip"),
    vote("s", "2", "a", "b", "left", "left"),  # a check
]


def test_votes_become_scores() -> None:
    one, two = voted_records(STUDIED, VOTES)
    assert (one.id, one.query, one.responses, one.sources) == ("1", "Why?", ["yes", "no", "so"], ["a", "b", "c"])
    assert one.scores == pytest.approx([2 / 3, 1 / 3, None]) and one.rewards == {"arena": one.scores}
    assert (two.query, two.scores) == ([{"role": "user", "content": "How?"}], [0.5, 0.5])
    (alone,) = list(voted_records(STUDIED, VOTES, without=["r", "s"]))
    assert alone.scores == [0.0, 1.0, None]
    by_strength = next(voted_records(STUDIED, VOTES, aggregate="plackett-luce"))
    a, b, c = by_strength.scores
    assert a is not None and b is not None and c is None and a == -b > 0
    # TRL's pairs of them: the tie is none.
    (row,) = exported(voted_records(STUDIED, VOTES), "trl-preference")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Why?", "yes", "no")


def test_rankings_become_scores() -> None:
    rankings = [Ranking("r", "1", {"a": 1, "b": 2, "c": 3}, 0.0), Ranking("s", "1", {"a": 1, "b": 2, "c": 2}, 0.0)]
    (record,) = voted_records(STUDIED, [], rankings)
    assert record.scores == [1.0, (0.5 + 0.25) / 2, (0 + 0.25) / 2]
    with pytest.raises(UserError, match="nobody has voted yet"):
        list(voted_records(STUDIED, [], rankings, without=["r", "s"]))
    with pytest.raises(UserError, match="--aggregate median"):
        list(voted_records(STUDIED, VOTES, aggregate="median"))


def test_a_reward_model_says_what_its_scores_say(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "query": "Why?", "responses": ["so", "no", "yes"], "rewards": {"rm": [3, 2, 2], "len": [1, None, 5],
         "logprob-sum:m#1": [1, 2, 3]}, "scores": [4, 2, 7]},
        {"query": "How?", "responses": ["so", "else", "thus"], "rewards": {"rm": [1, 9, 4]}, "scores": [1, 9, 4]},
        {"id": "3", "query": "Who?", "responses": ["I"], "rewards": {"rm": [1]}},
        {"id": "9", "query": "Else?", "responses": ["yes"], "rewards": {"rm": [1]}},
    ]  # fmt: skip
    tiny.write_rows(tmp_path / "scored.jsonl", rows)
    judged = machine_labels(STUDIED, [tmp_path / "scored.jsonl"])
    assert judged == {
        "rm": {("1", "a", "b"): "tie", ("1", "a", "c"): "lose", ("1", "b", "c"): "lose", ("2", "a", "b"): "win"},
        "len": {("1", "a", "c"): "win"},
    }
    # A file a system, with scores alone.
    tiny.write_rows(tmp_path / "a.jsonl", [{"id": "1", "query": "Why?", "responses": ["yes"], "scores": [1]}])
    tiny.write_rows(tmp_path / "b.jsonl", [{"id": "1", "query": "Why?", "responses": ["no"], "scores": [0]}])
    both = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert machine_labels(STUDIED, both) == {"scores": {("1", "a", "b"): "win"}}
    tiny.write_rows(tmp_path / "b.jsonl", [{"id": "1", "query": "Why?", "responses": ["yes"], "scores": [0]}])
    with pytest.raises(UserError, match=r"b\.jsonl: record '1': scores is 0\.0 here and 1\.0 before"):
        machine_labels(STUDIED, both)
    tiny.write_rows(tmp_path / "b.jsonl", rows[3:])
    with pytest.raises(UserError, match="none of its responses was shown"):
        machine_labels(STUDIED, both)


def test_a_judge_says_its_outcome_of_both_orders(tmp_path: Path) -> None:
    said = {"outcome": "lose", "a_first": [3, 4], "b_first": [9, 8]}
    rows = [
        {"id": "1", "query": "Why?", "responses": ["no", "yes"], "sources": ["a", "b"],
         "rewards": {"judge:j": [6, 6]}, "comparisons": {"j": said}},
        {"id": "2", "query": "How?", "responses": ["thus", "so"], "sources": ["a", "b"],
         "rewards": {"judge:j": [None, None]}, "comparisons": {"j": {"outcome": None}}},
    ]  # fmt: skip
    tiny.write_rows(tmp_path / "judged.jsonl", rows)
    assert machine_labels(STUDIED, [tmp_path / "judged.jsonl"]) == {"judge:j": {("1", "a", "b"): "win"}}


def test_another_dialogue_that_ends_alike_is_not_the_studied_one(tmp_path: Path) -> None:
    def dialogue(name: str) -> list[dict[str, str]]:
        turns = (("user", f"Tell me of {name}."), ("assistant", "There."), ("user", "Thanks!"))
        return [{"role": role, "content": text} for role, text in turns]

    studied = [Record(dialogue("d1"), ["so", "no"], sources=["a", "b"], id="d1")]
    scored = [
        {"id": name, "query": dialogue(name), "responses": ["so", "no"], "scores": scores}
        for name, scores in (("d1", [2, 1]), ("d2", [-3, 1]))
    ]
    tiny.write_rows(tmp_path / "scored.jsonl", scored)
    assert machine_labels(studied, [tmp_path / "scored.jsonl"]) == {"scores": {("d1", "a", "b"): "win"}}
    judged = [
        {"id": row["id"], "query": query_text(row["query"]), "responses": ["so", "no"],
         "comparisons": {"j": {"outcome": outcome}}}
        for row, outcome in zip(scored, ("win", "lose"), strict=True)
    ]  # fmt: skip
    tiny.write_rows(tmp_path / "judged.jsonl", judged)
    assert machine_labels(studied, [tmp_path / "judged.jsonl"]) == {"judge:j": {("d1", "a", "b"): "win"}}
    tiny.write_rows(tmp_path / "other.jsonl", [{**scored[1], "id": "d1"}])  # an id alone is none
    with pytest.raises(UserError, match="none of its responses was shown"):
        machine_labels(studied, [tmp_path / "other.jsonl"])
    tiny.write_rows(tmp_path / "again.jsonl", [{**judged[0], "comparisons": {"j": {"outcome": "lose"}}}])
    with pytest.raises(UserError, match="judge:j says lose here and win before"):
        machine_labels(studied, [tmp_path / "judged.jsonl", tmp_path / "again.jsonl"])


def test_the_records_of_a_study() -> None:
    assert STUDIED[1] == Record([{"role": "user", "content": "How?"}], ["thus", "so"], sources=["a", "b"], id="2")
