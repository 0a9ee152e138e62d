"""People's judgements: by hand, as a file of a stage, and what is said of files that are odd or broken."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.people import agreement, read_judgements
from rrhf.rewards.scoring import is_provided, make_scorer, reward_digest, score_records
from rrhf.rewards.stage import RewardSettings, score_file

RECORDS = [
    Record(query="q", id="one", responses=["a", "b", "c"], sources=["x/0", "y/0|z/0", "x/1"]),
    Record(query="r", id="two", responses=["d", "e"]),
    Record(query="s", id="three", responses=["f"]),
]


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "people.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ranks(record: str, rater: str, *values: float | None) -> list[dict[str, Any]]:
    return [
        {"id": record, "rater": rater, "response": index, "rank": rank}
        for index, rank in enumerate(values)
        if rank is not None
    ]


def scores(argument: str, context: RewardContext | None = None) -> list[list[float | None]]:
    return [record.scores for record in score_records(RECORDS, [f"people:{argument}"], context=context)]


def test_ranks_by_hand(tmp_path: Path) -> None:
    # of 3 responses rank 1 beats both others, 1; rank 2 beats one of two, 0.5; rank 3 none
    path = jsonl(tmp_path, *ranks("one", "anna", 1, 2, 3), *ranks("one", "bo", 2, 1, 3), *ranks("two", "bo", 2, 1))
    assert scores(str(path)) == [[0.75, 0.75, 0.0], [0.0, 1.0], [None]]
    # ties: (0, 1) beat one and are even with one, 1.5 of 2; partial: anna ranks responses 2 and 0 alone
    path = jsonl(
        tmp_path, *ranks("one", "anna", 2, None, 1), *ranks("one", "bo", 1, 1, 7), *ranks("two", "bo", None, 4)
    )
    assert scores(str(path)) == [[0.375, 0.75, 0.5], [None, None], [None]]


def test_ratings_by_hand_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text("id,rater,source,rating\none,anna,x/0,4\none,anna,z/0,2.5\none,bo,x/0,1\nthree,bo,provided/0,5\n")
    assert scores(str(path)) == [[2.5, 2.5, None], [None, None], [5.0]]
    path.write_text('id,text,rating\none,"b ",1\none,c,3\ntwo,e,2\n')  # one rater needs no name
    assert scores(str(path)) == [[None, 1.0, 3.0], [None, 2.0], [None]]


def test_choices_by_hand(tmp_path: Path) -> None:
    def choice(record: str, rater: str, response: int, which: str) -> dict[str, Any]:
        return {"id": record, "rater": rater, "response": response, "choice": which}

    path = jsonl(
        tmp_path, choice("one", "anna", 1, "best"), choice("one", "anna", 2, "worst"), choice("one", "bo", 1, "best"),
        choice("one", "bo", 0, "Worst"), choice("two", "bo", 0, "best"), choice("three", "bo", 0, "best"),
    )  # fmt: skip
    # best and worst: 1 and 0, between them 0.5; best alone of two: 1, the other 0; one response is no choice
    assert scores(str(path)) == [[0.25, 1.0, 0.25], [1.0, 0.0], [None]]
    assert agreement(read_judgements(path)) == {"worst": 0.0}  # of best all agree on one response: no α is defined


def test_plackett_luce(tmp_path: Path) -> None:
    # one ranking of two: the maximum of log σ(θ₁ − θ₀) − (θ₀² + θ₁²)/2 has θ₁ = −θ₀ = t with t = σ(−2t)
    path = jsonl(tmp_path, *ranks("two", "bo", 2, 1))
    _, (low, high), alone = scores(f"{path}#plackett-luce")
    assert low is not None and high is not None
    assert high == pytest.approx(1 / (1 + math.exp(2 * high)), abs=1e-5)
    assert (low, alone) == (-high, [None])
    # partial rankings that overlap: 0 above 1, 1 above 2, though nobody compared 0 with 2; ties do not compete
    path = jsonl(tmp_path, *ranks("one", "anna", 1, 2), *ranks("one", "bo", None, 1, 2), *ranks("two", "bo", 3, 3))
    (first, second, third), equal, _ = scores(f"{path}#plackett-luce")
    assert first is not None and second is not None and third is not None
    assert first > second > third
    assert equal == [0.0, 0.0]
    # symmetric judgements give equal scores, to the last bit
    path = jsonl(tmp_path, *ranks("one", "anna", 1, 2, 3), *ranks("one", "bo", 2, 1, 3))
    (first, second, third), *_ = scores(f"{path}#plackett-luce")
    assert first == second != third


def test_agreement(tmp_path: Path) -> None:
    rows = [*ranks("one", "anna", 1, 2, 3), *ranks("two", "anna", 1, 2)]
    same = [{**row, "rater": "bo"} for row in rows]
    assert agreement(read_judgements(jsonl(tmp_path, *rows, *same))) == {"ranks": 1.0}
    turned = [{**row, "rater": "bo", "rank": 4 - row["rank"]} for row in rows if row["id"] == "one"]
    (value,) = agreement(read_judgements(jsonl(tmp_path, *rows, *turned))).values()
    assert value < 0
    assert agreement(read_judgements(jsonl(tmp_path, *rows))) == {}  # one rater
    # interval α by hand: units (1, 2), (3, 3): D_o = (2·1 + 0) / 4 = 1/2; of the values 1, 2, 3, 3 the squared
    # differences of the 12 ordered pairs sum to 2·(1 + 4 + 4 + 1 + 1 + 0) = 22: D_e = 22/12; α = 1 − 6/22
    ratings = [
        {"id": "two", "rater": rater, "response": index, "rating": value}
        for rater, values in (("anna", (1, 3)), ("bo", (2, 3)))
        for index, value in enumerate(values)
    ]
    assert agreement(read_judgements(jsonl(tmp_path, *ratings)))["ratings"] == pytest.approx(1 - 6 / 22)


def test_as_a_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_records(tmp_path / "records.jsonl", RECORDS)
    path = jsonl(
        tmp_path, *ranks("one", "anna", 1, 2, 3), *ranks("one", "bo", 1, 1), *ranks("two", "anna", 1, 2),
        *ranks("four", "anna", 1, 2),
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="rrhf"):
        score_file(tmp_path / "records.jsonl", tmp_path / "scored.jsonl", RewardSettings([f"people:{path}"]))
    found = [record.scores for record in read_records(tmp_path / "scored.jsonl")]
    assert found == [[0.75, 0.5, 0.0], [1.0, 0.0], [None]]
    said = caplog.text
    assert said.count("9 ranks of 3 records by 2 raters; Krippendorff's α of ranks (ordinal) ") == 1
    assert "1 judgements that rank only some of the responses, the first in line 4" in said
    assert "1 judgements with ties, the first in line 4" in said
    assert "1 judgements of a record that is not there, the first in line 8" in said


def test_one_that_scores_nothing_new_and_depends_on_the_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *ranks("two", "bo", 2, 1))
    assert is_provided(f"people:{path}")
    before = reward_digest(f"people:{path}")
    assert before == reward_digest(f"people:{path}#plackett-luce")
    jsonl(tmp_path, *ranks("two", "bo", 1, 2))
    assert before != reward_digest(f"people:{path}")
    assert scores(str(path))[1] == [1.0, 0.0]  # nothing of the earlier file is kept


GOOD = {"id": "one", "rater": "anna", "response": 0, "rank": 1}
BROKEN: dict[str, tuple[list[dict[str, Any]], str]] = {
    "twice": ([GOOD, {**GOOD, "rank": 2}], "line 2: rater 'anna' judges response '0' of record 'one' after line 1"),
    "an index": ([{**GOOD, "response": 3}], r"line 1: record 'one' has no response '3' \(it has 0 to 2\)"),
    "a source": ([{"id": "one", "source": "w/0", "rank": 1}], r"line 1: record 'one' has no source 'w/0' \(it has x"),
    "a text": ([GOOD | {"response": None, "text": "z"}], "line 1: record 'one' has no text 'z'"),
    "no value": ([{"id": "one", "response": 0}], "line 1: needs one of the columns rank, rating, choice"),
    "two values": ([GOOD | {"rating": 3}], r"needs one of the columns rank, rating, choice \(it has id, rater"),
    "no id": ([GOOD, {"response": 0, "rank": 1}], "line 2: no id: "),
    "a rank of 0": ([GOOD | {"rank": 0}], "line 1: rank 0 is below 1"),
    "no number": ([GOOD | {"rank": "first"}], "line 1: 'first' is no number"),
    "no choice": ([{"id": "one", "response": 0, "choice": "good"}], "line 1: choice is 'good': it must be best"),
    "two bests": (
        [{"id": "one", "response": i, "choice": "best"} for i in (0, 1)],
        "line 2: rater '' judges response '1' of record 'one' after line 1, a second time",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_faults_name_file_and_line(name: str, tmp_path: Path) -> None:
    rows, said = BROKEN[name]
    path = jsonl(tmp_path, *rows)
    with pytest.raises(UserError, match=rf"people\.jsonl, .*{said}"):
        scores(str(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        make_scorer(f"people:{tmp_path / 'none.csv'}")
    path = jsonl(tmp_path, *ranks("four", "anna", 1, 2))
    with pytest.raises(UserError, match="known: mean, plackett-luce"):
        make_scorer(f"people:{path}#median")
    write_records(tmp_path / "records.jsonl", RECORDS)
    with pytest.raises(UserError, match=r"none of its 1 records is in .*records\.jsonl"):
        make_scorer(f"people:{path}", RewardContext(records=tmp_path / "records.jsonl"))
    (tmp_path / "empty.csv").write_text("id,response,rank\n")
    with pytest.raises(UserError, match="holds no judgements"):
        make_scorer(f"people:{tmp_path / 'empty.csv'}")
