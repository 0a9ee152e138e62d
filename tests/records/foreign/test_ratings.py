"""Rated responses: UltraFeedback and its pairs, GPT-4-LLM's comparisons, HelpSteer's attribute rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.records.foreign.ratings import weighted
from rrhf.records.formats import guess_format, load_dataset_records
from rrhf.records.record import Record
from rrhf.rewards.scoring import score_records


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def read(folder: Path, *rows: Any, **options: Any) -> list[Record]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(load_dataset_records(path, **options))


def completion(model: str, response: str | None, overall: Any, ratings: dict[str, Any], **more: Any) -> dict[str, Any]:
    annotations = {aspect: {"Rating": rating, "Rationale": "because"} for aspect, rating in ratings.items()}
    return {"model": model, "response": response, "overall_score": overall, "annotations": annotations, **more}


def test_ultrafeedback(tmp_path: Path) -> None:
    row = {
        "source": "flan", "instruction": "Add 1 and 2.", "models": ["a", "b", "c"], "correct_answers": ["3"],
        "completions": [
            completion("a", "3", 8.0, {"honesty": "5", "helpfulness": "4"}, **{"fine-grained_score": 4.5}),
            completion("b", "12", 10, {"honesty": "N/A", "helpfulness": "1"}, critique="wrong"),
            completion("c", "", 1, {}),
        ],
    }  # fmt: skip
    counts = Counter[str]()
    (record,) = read(tmp_path, row, counts=counts)
    assert record == Record(
        query=user("Add 1 and 2."),
        responses=["3", "12"],
        sources=["system/a", "system/b"],
        scores=[4.5, 1.0],  # the mean of what is rated where none is given, not the overall score of 10
        rewards={
            "overall_score": [8.0, 10.0],
            "fine-grained_score": [4.5, 1.0],
            "honesty": [5.0, None],
            "helpfulness": [4.0, 1.0],
        },
        extra={"source": "flan", "correct_answers": ["3"]},
    )
    assert counts == {"empty response dropped": 1}
    bare = {"instruction": "x", "completions": [{"response": "y", "overall_score": "7"}]}
    (record,) = read(tmp_path, bare)
    assert (record.scores, record.sources) == ([7.0], ["system/0"])


PAIRS: dict[str, dict[str, Any]] = {
    "argilla": {
        "instruction": "Sky?", "chosen_response": "Blue.", "rejected_response": "Green.",
        "chosen_avg_rating": 4.75, "rejected_avg_rating": 2.0,
    },
    "cleaned": {
        "prompt": "Sky?",
        "chosen": [*user("Sky?"), {"role": "assistant", "content": "Blue."}], "chosen-rating": 4.75,
        "rejected": [*user("Sky?"), {"role": "assistant", "content": "Green."}], "rejected-rating": 2,
    },
    "zephyr": {
        "prompt": "Sky?", "messages": [], "score_chosen": 4.75, "score_rejected": 2.0,
        "chosen": [*user("Sky?"), {"role": "assistant", "content": "Blue."}],
        "rejected": [*user("Sky?"), {"role": "assistant", "content": "Green."}],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_rated_pairs_keep_their_ratings(name: str, tmp_path: Path) -> None:
    assert guess_format(PAIRS[name], "file") == "ultrafeedback-binarized"
    (record,) = read(tmp_path, {**PAIRS[name], "source": "flan"})
    assert record == Record(
        query=user("Sky?"), responses=["Blue.", "Green."], sources=["human/chosen", "human/rejected"],
        scores=[4.75, 2.0], extra={"source": "flan"},
    )  # fmt: skip
    (record,) = read(tmp_path, {**PAIRS[name], "chosen-model": "gpt-4", "rejected-model": "llama"})
    assert record.sources == ["system/gpt-4", "system/llama"]


def test_rated_pairs_beside_a_query_keep_their_ratings(tmp_path: Path) -> None:
    row = {"query": "Sky?", "chosen": "Blue.", "rejected": "Green.", "score_chosen": 4.75, "score_rejected": 2.0}
    (record,) = read(tmp_path, row)
    assert (record.query, record.responses, record.scores) == ("Sky?", ["Blue.", "Green."], [4.75, 2.0])
    (record,) = read(tmp_path, {name: row[name] for name in ("query", "chosen", "rejected")})
    assert record.scores == [1.0, 0.0]


@pytest.mark.parametrize("huge", [10**400, -(10**400)], ids=["above", "below"])
def test_numbers_that_no_float_holds_are_no_ratings(huge: int, tmp_path: Path) -> None:
    (record,) = read(tmp_path, {**PAIRS["zephyr"], "score_chosen": huge})
    assert record.scores == [None, 2.0]


def test_gpt4_llm(tmp_path: Path) -> None:
    answers = [
        {"response": "Paris.", "source": "gpt4", "score": 9.0},
        {"response": "Lyon.", "source": "opt-iml", "score": 2.0},
        {"response": "France.", "source": "chatgpt"},
    ]
    rows = [
        {"user_input": "Capital?", "responses_and_scores": answers},
        {"user_input": "Sky?", "completion_a": "Blue.", "completion_b": "Green."},
        {"user_input": "Sea?", "responses_and_scores": "none"},
    ]
    counts = Counter[str]()
    first, second = read(tmp_path, *rows, counts=counts)
    assert first == Record(
        query=user("Capital?"), responses=["Paris.", "Lyon.", "France."],
        sources=["system/gpt4", "system/opt-iml", "system/chatgpt"], scores=[9.0, 2.0, None],
    )  # fmt: skip
    assert (second.responses, second.scores) == (["Blue.", "Green."], [1.0, 0.0])
    assert counts == {"`responses_and_scores` is no list of objects": 1}


def attributes(prompt: Any, response: Any, helpfulness: int, verbosity: int, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": verbosity, **more}


def test_helpsteer_rows_in_succession_are_one_record(tmp_path: Path) -> None:
    rows = [
        attributes("C#", "A language.", 3, 1, origin="a"),
        attributes("C#", "A note.", 4, 2, origin="b"),
        attributes("Hi", "Hello.", 2, 0, origin="a"),
        [1],
        attributes("C#", "A key.", 1, 1, origin="a"),
        attributes("C#", None, 1, 1, origin="a"),
    ]
    counts = Counter[str]()
    first, second, third = read(tmp_path, *rows, counts=counts)
    assert first == Record(
        query=user("C#"), responses=["A language.", "A note."], scores=[3.0, 4.0],
        rewards={"helpfulness": [3.0, 4.0], "verbosity": [1.0, 2.0]}, extra={"origin": ["a", "b"]},
    )  # fmt: skip
    assert (second.responses, third.responses) == (["Hello."], ["A key."])
    assert third.id == first.id + "-2"
    assert counts == {"a row that is no object": 1, "empty response dropped": 1}


def test_helpsteer_dialogues(tmp_path: Path) -> None:
    prompt = "Hi\n<extra_id_1>Assistant\nHello.\nYes?\n<extra_id_1>User\nWho\nare you?"
    (record,) = read(tmp_path, attributes(prompt, "A bot.", 3, 1))
    assert record.query == [*user("Hi"), {"role": "assistant", "content": "Hello.\nYes?"}, *user("Who\nare you?")]


def test_attribute_rows_as_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response,correctness,who\np,a,4,x\np,b,,y\n", encoding="utf-8")
    (record,) = load_dataset_records(tmp_path / "a.csv", "helpsteer")
    assert (record.rewards, record.scores, record.extra) == ({"correctness": [4.0, None]}, [], {"who": ["x", "y"]})


def test_weights() -> None:
    record = Record(query="q", responses=["a", "b"], rewards={"helpfulness": [3.0, 4.0], "verbosity": [1.0, None]})
    assert weighted(record, {"helpfulness": 0.5, "verbosity": -1.0}).scores == [0.5, None]
    # Scored before, the record kept its first scores under this name, where --reward provided finds them.
    before = replace(record, rewards={**record.rewards, "provided": [3.0, 4.0]})
    (scored,) = score_records([weighted(before, {"helpfulness": 2.0})], ["provided"])
    assert scored.scores == [6.0, 8.0]
    with pytest.raises(UserError, match=r"no rating 'help' to weigh \(it has helpfulness, verbosity\)"):
        weighted(record, {"help": 1.0})
