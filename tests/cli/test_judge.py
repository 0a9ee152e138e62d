"""``rrhf judge`` and ``rrhf score --dry_run`` at a real server on loopback."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rrhf.cli.main import main
from rrhf.common.errors import UserError
from rrhf.evaluation.pairwise.questions import answers_of_both, answers_to, read_questions
from rrhf.records.files import read_records
from support import misbehaving as bad
from support import tiny
from support.judge_replies import ASPECTS

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")
pytest.importorskip("choix", reason="the extra `judging` is not installed")


@pytest.fixture
def server() -> Iterator[bad.Misbehaving]:
    def behave(handler: bad.Handler, body: dict[str, Any]) -> None:
        texts = re.findall(r"Response \d+:\n<<begin .*>>\n(.*)\n<<end", body["messages"][-1]["content"])
        scores = {f"Response {n}": dict.fromkeys(ASPECTS, 1 + len(text) % 5) for n, text in enumerate(texts, 1)}
        handler.send_json(bad.answer(body, [json.dumps(scores)]))

    with bad.misbehaving() as running:
        running.default = behave
        yield running


@pytest.fixture
def folder(tmp_path: Path, server: bad.Misbehaving, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"url: {server.url}\nmodel: {name}\nprice: [1, 2]\n", encoding="utf-8")
    questions = [
        {"question_id": i, "category": ("maths", "prose")[i % 2], "turns": [f"Question number {i}?"]} for i in range(4)
    ]
    tiny.write_rows(tmp_path / "questions.jsonl", questions)
    for name, text in (("a", "xxxx"), ("b", "xx")):
        rows = [{"query": row["turns"][0], "responses": [text]} for row in questions]
        tiny.write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


JUDGE = (
    "judge",
    "--questions",
    "questions.jsonl",
    "--a",
    "a.jsonl",
    "--b",
    "b.jsonl",
    "--output",
    "out.json",
    "--samples",
    "9",
)


def test_two_judges_from_the_command_line(
    folder: Path, server: bad.Misbehaving, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*JUDGE, "--judge", "one.yaml", "two.yaml"]) == 0
    result = json.loads((folder / "out.json").read_text())
    one = result["judges"]["one.yaml"]
    assert (one["n"], one["win"]) == (4, 4)
    assert (one["summed_scores"]["a"], one["summed_scores"]["b"]) == (80.0, 48.0)
    assert one["categories"]["maths"]["summed_scores"]["a"] == 40.0
    assert result["agreement"]["one.yaml / two.yaml"]["same"]["mean"] == 1.0
    printed = capsys.readouterr().out
    for words in (
        "a wins 4",
        "at equal length",
        "80.0 – 48.0",
        "contradict each other on 0.0%",
        "a constant answer",
        "maths",
    ):
        assert words in printed
    first, *others = read_records(folder / "out.comparisons.jsonl")
    assert (first.query, first.responses, len(others)) == ("Question number 0?", ["xxxx", "xx"], 3)
    assert first.rewards == {"judge:one.yaml": [20.0, 12.0], "judge:two.yaml": [20.0, 12.0]}
    said = {"outcome": "win", "a_first": [20.0, 12.0], "b_first": [20.0, 12.0]}
    assert first.extra == {"category": "maths", "comparisons": {"one.yaml": said, "two.yaml": said}}
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("model: tiny\n")
    assert main(["report", "run", "--results", "out.json", "--output", "page.html"]) == 0
    page = (folder / "page.html").read_text()
    judges = page[page.index('id="judges"') : page.index('id="people"')]
    for words in ("one.yaml", "two.yaml", "80.0", "48.0", "maths"):
        assert words in judges, words
    server.posts.clear()
    assert main([*JUDGE, "--judge", "one.yaml"]) == 2  # the output is there
    assert main([*JUDGE, "--judge", "one.yaml", "--overwrite"]) == 0
    assert server.posts == []  # all replies were in the journal


def test_what_is_missing_is_said_before_anything_is_paid_for(
    folder: Path, server: bad.Misbehaving, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert main([*JUDGE, "--judge", "one.yaml"]) == 2
    assert "scikit-learn" in capsys.readouterr().err and server.posts == []


def test_an_empty_answer_is_judged_as_it_is(
    folder: Path, server: bad.Misbehaving, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.read_rows(folder / "b.jsonl")
    rows[1] |= {"responses": [""]}
    tiny.write_rows(folder / "b.jsonl", rows)
    assert main([*JUDGE, "--judge", "one.yaml"]) == 0
    assert "b.jsonl: 1 answers are empty" in capsys.readouterr().err
    assert json.loads((folder / "out.json").read_text())["judges"]["one.yaml"]["n"] == 4
    tiny.write_rows(folder / "b.jsonl", [rows[0], *rows[2:]])
    assert main([*JUDGE, "--judge", "one.yaml", "--overwrite"]) == 2  # no answer at all


def test_judging_at_urls(folder: Path, memory: Any, server: bad.Misbehaving) -> None:
    """All that is read lies in memory; the numbers name it so, and a journal asks nothing twice."""
    for file in list(folder.glob("*.*")):
        memory.put(str(file), f"/in/{file.name}")
        file.unlink()
    given = ["judge", "--samples", "9", "--judge", "memory://in/one.yaml", "memory://in/two.yaml", "--output"]
    for flag, name in (("questions", "questions"), ("a", "a"), ("b", "b")):
        given += [f"--{flag}", f"memory://in/{name}.jsonl"]
    at = given.index("--output") + 1
    assert main([*given[:at], "memory://out/said.json", *given[at:]]) == 0
    said, asked = json.loads(memory.cat("/out/said.json")), len(server.posts)
    assert said["a"] == "memory://in/a.jsonl" and list(said["judges"]) == [
        f"memory://in/{n}.yaml" for n in ("one", "two")
    ]
    assert len(memory.cat("/out/said.comparisons.jsonl").splitlines()) == 4
    assert str(folder).encode() not in b"".join(memory.cat(path) for path in memory.find("/out"))
    assert main([*given[:at], "memory://out/again.json", *given[at:]]) == 0 and len(server.posts) == asked


def test_questions_as_fastchat_has_them(folder: Path) -> None:
    """Vicuna's file of today, with more than one turn and a reference answer here and there, and that of 2023."""
    today = [
        {"question_id": 81, "category": "writing", "turns": ["Write a short poem on rain.", "Now without an e."]},
        {"question_id": 82, "category": "maths", "turns": ["What is 3 + 4?"], "reference": ["7"]},
    ]
    before = [{"question_id": 7, "text": "Why is the sky blue?", "category": "generic"}]
    for rows, texts in ((today, ["Write a short poem on rain.", "What is 3 + 4?"]), (before, ["Why is the sky blue?"])):
        tiny.write_rows(folder / "question.jsonl", rows)
        questions = read_questions(folder / "question.jsonl")
        assert [(q.query, q.category) for q in questions] == list(zip(texts, [row["category"] for row in rows]))
        # `rrhf sample` keeps the questions' ids; answers from elsewhere may have the query alone.
        for name, ids in (("with.jsonl", True), ("without.jsonl", False)):
            answers = [
                {**({"id": q.id} if ids else {}), "query": q.query, "responses": [f"to {q.query}"]} for q in questions
            ]
            tiny.write_rows(folder / name, answers)
            assert list(answers_to(questions, folder / name).values()) == [f"to {text}" for text in texts]
        assert main(["convert", "question.jsonl", "--output", "queries.jsonl", "--overwrite"]) == 0
        assert [record.id for record in read_records("queries.jsonl")] == [question.id for question in questions]


def test_answers_are_found_by_the_whole_query(folder: Path) -> None:
    """By its last message "Why?" had the answer to a dialogue that ends so, and an id alone was trusted."""
    user, dialogue = {"role": "user", "content": "Why?"}, [{"role": "user", "content": "It rains."}]
    dialogue += [{"role": "assistant", "content": "It does."}, user]
    tiny.write_rows(folder / "q.jsonl", [{"id": "1", "query": "Why?"}, {"id": "2", "query": dialogue}])
    questions = read_questions(folder / "q.jsonl")

    def answers(*rows: dict[str, Any]) -> dict[str, str]:
        tiny.write_rows(folder / "answers.jsonl", rows)
        return answers_to(questions, folder / "answers.jsonl")

    alone, whole = {"query": [user], "responses": ["So."]}, {"query": dialogue, "responses": ["Clouds."]}
    for rows in ((alone, whole), (whole, alone), ({**whole, "id": "1"}, {**alone, "id": "2"})):
        assert answers(*rows) == {"1": "So.", "2": "Clouds."}
    again = {"id": "1", "query": "Why?", "responses": ["By its id."]}
    assert answers(again, {**alone, "id": "other"}, whole)["1"] == "By its id."
    with pytest.raises(UserError, match="1 of 2 questions have no answer there, such as '1': answer all"):
        answers(whole)
    with pytest.raises(UserError, match="'1', under whose id another query stands there: answer all"):
        answers({"id": "1", "query": "Who?", "responses": ["I."]}, whole)


def test_responses_that_the_data_brought_are_not_judged_unseen(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`rrhf sample` appends its responses to those that are there: the first of each file is the data set's."""
    questions = read_questions(folder / "questions.jsonl")

    def write(name: str, brought: int, own: str) -> Path:
        rows = [
            {
                "query": question.query,
                "responses": [*["So."] * (at < brought), own],
                "sources": [*["human/chosen"] * (at < brought), "top-p/0"],
            }
            for at, question in enumerate(questions)
        ]
        tiny.write_rows(folder / name, rows)
        return folder / name

    with pytest.raises(UserError, match=r"the same in both, of source 'human/chosen'.*--queries_only"):
        answers_of_both(questions, write("a.jsonl", 4, "Yes."), write("b.jsonl", 4, "No."))
    said = answers_of_both(questions, write("a.jsonl", 3, "Yes."), write("b.jsonl", 0, "No."))
    assert [list(answers.values()) for answers in said] == [["So."] * 3 + ["Yes."], ["No."] * 4]
    assert "a.jsonl: 3 answers are the first of several responses to the query: human/chosen (3)" in caplog.text
    caplog.clear()
    answers_of_both(questions, write("a.jsonl", 0, "Yes."), write("b.jsonl", 0, "Yes."))  # two systems that agree
    assert "several" not in caplog.text


def test_the_judge_of_the_example_sums_as_table_9_does(folder: Path, server: bad.Misbehaving) -> None:
    page = (Path(__file__).parents[2] / "docs" / "judging.md").read_text(encoding="utf-8")
    example = page[page.index("### Vicuna") :].partition("```yaml\n")[2].partition("```")[0]
    url = "http://localhost:8000/v1"
    assert url in example

    def behave(handler: bad.Handler, body: dict[str, Any]) -> None:
        asked = body["messages"][-1]["content"]
        texts = re.findall(r"Response (\d+):\n<<begin .*>>\n(.*)\n<<end", asked)
        lines = [f"Response {n}: Quality: {9 if text == 'xxxx' else 6.5}" for n, text in texts]
        handler.send_json(bad.answer(body, ["\n".join(lines) if "from 1 to 10" in asked else "what?"]))

    server.default = behave
    (folder / "vicuna.yaml").write_text(example.replace(url, server.url) + "json: never\n", encoding="utf-8")
    assert main([*JUDGE, "--judge", "vicuna.yaml"]) == 0
    sums = json.loads((folder / "out.json").read_text())["judges"]["vicuna.yaml"]["summed_scores"]
    assert (sums["a"], sums["b"]) == (36.0, 26.0)


def test_judging_that_is_killed_asks_only_for_the_rest(folder: Path, server: bad.Misbehaving) -> None:
    died = [tiny.die("rrhf.rewards.judges.judge:Judge._keep", 6)]
    killed = tiny.warm(*JUDGE, "--judge", "one.yaml", cwd=folder, faults=died)
    assert killed.code == -signal.SIGKILL and not (folder / "out.json").exists()
    server.posts.clear()
    tiny.warm(*JUDGE, "--judge", "one.yaml", cwd=folder).done()
    asked = [post for post in server.posts if post["max_tokens"] > 1]
    assert len(asked) == 2 * 2 * 4 - 5  # both orders of a and of the null model, without the five that were kept
    assert json.loads((folder / "out.json").read_text())["judges"]["one.yaml"]["n"] == 4


def test_a_question_without_an_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_rows(folder / "b.jsonl", tiny.read_rows(folder / "b.jsonl")[1:])
    assert main([*JUDGE, "--judge", "one.yaml"]) == 2
    assert "1 of 4 questions have no answer there" in capsys.readouterr().err


def test_a_dry_run_asks_nothing(folder: Path, server: bad.Misbehaving, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "--data", "a.jsonl", "--output", "scored.jsonl", "--reward", "judge:one.yaml"]
    assert main([*command, "--dry_run"]) == 0
    assert "judge:one.yaml: 4 calls, 0 of them in the journal; about " in capsys.readouterr().out
    assert server.posts == [] and not (folder / "scored.jsonl").exists()
    assert main(command) == 0
    assert [row["scores"] for row in tiny.read_rows(folder / "scored.jsonl")] == [[20.0]] * 4
    assert main([*command, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "4 calls, 4 of them in the journal; about 0 tokens of prompts, at most 0 of replies: $0.00 where" in out


def test_scoring_that_is_killed_asks_only_for_the_rest(folder: Path, server: bad.Misbehaving) -> None:
    rows = [{"id": f"r{i}", "query": f"q {i}", "responses": ["x" * i + "y", "z"]} for i in range(6)]
    tiny.write_rows(folder / "data.jsonl", rows)
    command = ("score", "--data", "data.jsonl", "--reward", "judge:one.yaml", "--output")
    killed = tiny.warm(
        *command, "scored.jsonl", cwd=folder, faults=[tiny.die("rrhf.rewards.judges.judge:Judge._keep", 4)]
    )
    assert killed.code == -signal.SIGKILL, killed.err[-2000:]
    kept = [line for path in folder.glob("one.yaml.replies/*") for line in path.read_text().splitlines()]
    assert len(kept) == 1 + 3  # whether it takes a schema, and three replies
    server.posts.clear()
    tiny.warm(*command, "scored.jsonl", cwd=folder).done()
    assert len([post for post in server.posts if post["max_tokens"] > 1]) == 6 - 3
    tiny.warm(*command, "again.jsonl", cwd=folder).done()
    assert (folder / "again.jsonl").read_bytes() == (folder / "scored.jsonl").read_bytes()
    assert [row["scores"] for row in tiny.read_rows(folder / "again.jsonl")][:2] == [[8.0, 8.0], [12.0, 8.0]]
