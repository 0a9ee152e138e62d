"""``rrhf arena results`` on a study in its file: numbers, tables, records that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rrhf.arena.settings import StudySettings
from rrhf.arena.store import Answer, assigned, create_study, find_rater, open_study, save_answer
from rrhf.arena.systems import comparisons, read_systems
from rrhf.cli.main import main
from rrhf.common.errors import UserError
from rrhf.common.remote import Store
from rrhf.records.files import read_records
from support import tiny

pytest.importorskip("choix", reason="the extra `judging` is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of two systems and eight queries; both raters like the longer response, but are of two minds once."""
    monkeypatch.chdir(tmp_path)
    for name, texts in (("long", "a b c d e f g h i j k l m {}"), ("short", "n o p q r s t u v w x y {}")):
        rows = [
            {"id": str(i), "query": f"Question {i}?", "responses": [texts.format(i)], "scores": [len(texts)]}
            for i in range(8)
        ]
        tiny.write_rows(tmp_path / f"{name}.jsonl", rows)
    systems = read_systems(["long.jsonl", "short.jsonl"])
    settings = StudySettings(common=8, checks=1)
    tokens = create_study("study.db", systems, comparisons(systems, []), ["anna", "ben"], settings, "http://127.0.0.1")
    with open_study("study.db") as study:
        for name in ("anna", "ben"):
            rater = find_rater(study, tokens[name])
            assert rater is not None
            for place in range(1, 10):
                shown, _ = assigned(study, rater, place)
                whole = [i for i, system in enumerate(shown.order) if shown.task.spoilt is None or
                         system != shown.task.systems[shown.task.spoilt]]  # fmt: skip
                best = max(whole, key=lambda i: shown.order[i] == "long")
                choice = ("left", "right")[best]
                if name == "ben" and shown.task.query == "3" and shown.task.spoilt is None:
                    choice = "tie"
                assert save_answer(study, rater, shown.task, Answer(choice), 0)
    return tmp_path


def test_results_of_a_study(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["arena", "results", "study.db", "--samples", "9", "--scores", "long.jsonl", "short.jsonl"]
    assert main([*command, "--output", "out.json", "--markdown", "out.md", "--votes", "votes.jsonl"]) == 0
    found = json.loads((folder / "out.json").read_text())
    (one,) = found["comparisons"]
    assert (one["a"], one["b"], one["win"], one["tie"], one["lose"]) == ("long", "short", 15, 1, 0)
    assert (found["votes"], found["checks"]) == (16, {"n": 2, "passed": 2})
    assert found["agreement"]["raters"]["same"]["mean"] == 7 / 8
    assert found["agreement"]["judges"]["scores"]["ben"]["same"]["mean"] == 7 / 8
    printed = capsys.readouterr().out
    for words in ("long against short", "Bradley–Terry", "anna / ben", "scores and all raters", "passed: 2 of 2"):
        assert words in printed
    assert "| long against short | 8 |" in (folder / "out.md").read_text()
    votes = tiny.read_rows(folder / "votes.jsonl")
    assert len(votes) == 18 and sum(vote["spoilt"] is not None for vote in votes) == 2
    assert {vote["choice"] for vote in votes if vote["rater"] == "ben" and vote["query"] == "3"} >= {"tie"}
    assert main([*command, "--output", "out.json"]) == 2  # it is there
    assert main([*command, "--without", "bob"]) == 2
    assert "--without bob: the study's raters are anna, ben" in capsys.readouterr().err


def test_votes_as_records_and_as_trl_s_pairs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["arena", "results", "study.db", "--samples", "1", "--export"]
    assert main([*command, "voted.jsonl"]) == 0
    records = {record.id: record for record in read_records("voted.jsonl", require="scores")}
    assert len(records) == 8 and records["0"].sources == ["long", "short"]
    assert (records["0"].scores, records["3"].scores) == ([1.0, 0.0], [0.75, 0.25])
    assert main([*command, "pairs.jsonl", "--to", "trl-preference"]) == 0
    rows = tiny.read_rows(folder / "pairs.jsonl")
    assert len(rows) == 8 and rows[0]["chosen"].startswith("a b c") and rows[0]["rejected"].startswith("n o p")
    assert "8 rows in pairs.jsonl" in capsys.readouterr().out
    # People are a reward like any other: what they say of a query goes to training, or into `rrhf evaluate --pairs`.
    assert main([*command[:-1], "--to", "trl-preference"]) == 2


def test_names_break_no_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "a|<img src=x onerror=alert(1)>"
    for name in ("long", "short"):
        rows = [
            {**row, "rewards": {bad: [1.0 if name == "long" else 0.0]}} for row in tiny.read_rows(Path(f"{name}.jsonl"))
        ]
        tiny.write_rows(folder / f"{name}.jsonl", rows)
    command = ["arena", "results", "study.db", "--samples", "9", "--scores", "long.jsonl", "short.jsonl"]
    assert main([*command, "--markdown", "out.md"]) == 0
    text = (folder / "out.md").read_text()
    assert "<img" not in text.replace("\\<img", "") and "a\\|" in text


def test_the_exported_records_train(folder: Path) -> None:
    tiny.write_model(folder / "model", chat=False)
    assert main(["arena", "results", "study.db", "--samples", "1", "--export", "voted.jsonl"]) == 0
    command = ("train", "--model", "model", "--data", "voted.jsonl", "--output", "trained", "--max_steps", "1")
    tiny.warm(*command, "--device", "cpu", "--max_length", "64", cwd=folder).done()
    assert (folder / "trained" / "model.safetensors").exists()


def test_the_report_shows_the_results(folder: Path) -> None:
    assert main(["arena", "results", "study.db", "--samples", "9", "--output", "out.json"]) == 0
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("model: tiny\n")
    assert main(["report", "run", "--results", "out.json", "--output", "page.html"]) == 0
    page = (folder / "page.html").read_text()
    people = page[page.index('id="people"') :]
    for words in ("study.db", "16 votes", "long", "short", "93.8"):  # 15 of 16 votes
        assert words in people, words


def test_a_command_that_failed_does_not_stand_in_its_own_way(
    folder: Path, memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    systems = read_systems(["long.jsonl", "short.jsonl"])
    create_study("new.db", systems, comparisons(systems, []), ["anna"], StudySettings(), "http://127.0.0.1")
    command = ["arena", "results", "new.db", "--output", "memory://out/r.json"]
    assert main([*command, "--export", "memory://out/e.jsonl"]) == 2  # the numbers are made before the votes are missed
    assert "nobody has voted yet" in capsys.readouterr().err and memory.find("/out") == []
    assert main(command) == 0
    assert "/out/r.json" in memory.find("/out")


def test_what_a_study_reads_and_tells_may_be_at_urls(folder: Path, memory: Any) -> None:
    """Systems and scores come from there, all four outputs go there; what was not sent is sent by the same command."""
    for name in ("long", "short"):
        memory.put(str(folder / f"{name}.jsonl"), f"/in/{name}.jsonl")
    both = ["--data", "memory://in/long.jsonl", "--data=other=memory://in/short.jsonl"]
    assert main(["arena", "create", "new.db", *both]) == 0
    with open_study("new.db") as study:
        assert list(study.systems) == ["long", "other"]
    outputs = {"output": "all.json", "markdown": "tables.md", "votes": "votes.jsonl", "export": "voted.jsonl.gz"}
    command = ["arena", "results", "study.db", "--samples", "9", "--scores", "memory://in/long.jsonl", "short.jsonl"]
    for flag, name in outputs.items():
        command += [f"--{flag}", f"memory://out/{name}"]
    upload = Store.upload

    def fails(self: Store, *rest: Any, **options: Any) -> None:
        if self.name == "votes.jsonl":
            raise UserError(f"{self}: cannot be written")
        upload(self, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "upload", fails)
        assert main(command) == 2
    assert main(command) == 0
    sums = [f"{name}.sha256" for name in outputs.values()]
    assert sorted(path.rpartition("/")[2] for path in memory.find("/out")) == sorted([*outputs.values(), *sums])
    assert json.loads(memory.cat("/out/all.json"))["votes"] == 16
    assert main(command) == 2  # all are there
