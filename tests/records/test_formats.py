"""Foreign formats: what each becomes, what is dropped and how it is counted."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.records.files import read_records, write_records
from rrhf.records.formats import COLUMNS, FORMATS, guess_format, load_dataset_records, load_format
from rrhf.records.record import Record, content_id

DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who\nare you?\n\nAssistant:"


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hh": (
        {"chosen": DIALOGUE + " A bot.", "rejected": DIALOGUE + " A man."},
        {"query": DIALOGUE, "responses": [" A bot.", " A man."]},
    ),
    "hh-chat": (
        {"chosen": DIALOGUE + " A bot.", "rejected": DIALOGUE + " A man."},
        {
            "query": [*user("Hi"), assistant("Hello."), *user("Who\nare you?")],
            "responses": ["A bot.", "A man."],
        },
    ),
    "static": (
        {"prompt": DIALOGUE, "response": " A bot.", "chosen": " A bot.", "rejected": " A man."},
        {"query": DIALOGUE, "responses": [" A bot.", " A man."]},
    ),
    "preference, texts": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"query": "The sky is", "responses": [" blue.", " green."]},
    ),
    "preference, texts, implicit": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"query": "The sky is", "responses": [" blue.", " green."]},
    ),
    "preference, messages": (
        {"prompt": user("Sky?"), "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
        {"query": user("Sky?"), "responses": ["Blue.", "Green."]},
    ),
    "preference, messages, implicit": (
        {"chosen": [*user("Sky?"), assistant("Blue.")], "rejected": [*user("Sky?"), assistant("Green.")]},
        {"query": user("Sky?"), "responses": ["Blue.", "Green."]},
    ),
    "preference, messages that repeat the prompt": (
        {
            "prompt": user("Sky?"),
            "chosen": [*user("Sky?"), assistant("Blue.")],
            "rejected": [*user("Sky?"), assistant("Green.")],
        },
        {"query": user("Sky?"), "responses": ["Blue.", "Green."]},
    ),
    "preference, a text before messages": (
        {"prompt": "Sky?", "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
        {"query": user("Sky?"), "responses": ["Blue.", "Green."]},
    ),
    "preference, texts, behind Alpaca's columns": (
        {"instruction": "Add.", "input": "1 2", "chosen": "The sum is 3.", "rejected": "The sum is 4."},
        {"query": user("Add.\n\n1 2"), "responses": ["The sum is 3.", "The sum is 4."]},
    ),
    "preference, texts, behind a question": (
        {"system": "", "question": "Sky?", "chosen": "Sure, blue.", "rejected": "Sure! Green."},
        {"query": user("Sky?"), "responses": ["Sure, blue.", "Sure! Green."]},
    ),
    "preference, texts, behind a query": (
        {"query": "The sky", "chosen": " is blue.", "rejected": " is green."},
        {"query": "The sky", "responses": [" is blue.", " is green."]},
    ),
    "preference, texts, with a system prompt": (
        {"system": "Be a cat.", "prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."},
        {"query": [{"role": "system", "content": "Be a cat."}, *user("Sky?")], "responses": ["Blue.", "Green."]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pairs(tmp_path: Path, name: str) -> None:
    row, expected = CASES[name]
    path = lines(tmp_path / "a.jsonl", {**row, "weight": 3, "scores": "theirs"})
    (record,) = load_dataset_records(path, name.split(",")[0])
    assert record == Record(
        **expected,
        sources=["human/chosen", "human/rejected"],
        scores=[1.0, 0.0],
        extra={"weight": 3, "original_scores": "theirs"},
    )


@pytest.mark.parametrize("format", [None, "my_formats:foreign"])
def test_queries_alone_stay_where_all_their_responses_are_empty(
    format: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_formats.py").write_text("def foreign(row):\n    return row\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = {"query": "Sky?", "responses": [" ", ""], "scores": [1, 0], "topic": "sky"}
    path = lines(tmp_path / "a.jsonl", row, {"query": "Sea?", "responses": ["Blue.", ""]})
    assert [record.query for record in load_dataset_records(path, format)] == ["Sea?"]
    counts = Counter[str]()
    first, second = load_dataset_records(path, format, counts=counts, queries_only=True)
    assert (first.query, first.extra) == ("Sky?", {"topic": "sky"}) and second.query == "Sea?"
    assert not (first.responses or first.scores or second.responses or counts)


def test_pairs_whose_query_is_not_known_are_counted(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"input": "Sky?", "chosen": "It is blue.", "rejected": "It is green."},
        {"question": "Sky?", "chosen": "Sky? Blue.", "rejected": "Sky? Green."},
        {"input": " ", "chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"system": 3, "chosen": "The sky is blue.", "rejected": "The sky is green."},
    )
    counts = Counter[str]()
    (record,) = load_dataset_records(path, counts=counts)
    assert record.query == "The sky is"
    assert counts == {
        "chosen and rejected with `input`, but no `prompt` nor `instruction`: rename it": 1,
        "chosen and rejected both have the text of `question` at their start: drop that column": 1,
        "`system` is no text": 1,
    }


def test_system_prompts_and_earlier_turns_come_before_the_instruction(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be a cat."}
    talk = [{"from": "human", "value": "Sky?"}]
    pair = {"chosen": {"from": "gpt", "value": "Blue."}, "rejected": {"from": "gpt", "value": "Green."}}
    theirs = {"from": "system", "value": "Be a dog."}
    for row, query in (
        ({"instruction": "Sky?", "output": "Blue.", "history": [["Hi", "Miaow."]]}, [*user("Hi"), assistant("Miaow.")]),
        ({"instruction": "Sky?", "chosen": "Blue.", "rejected": "Green.", "history": []}, []),
        ({"conversations": talk, **pair}, []),
        ({"conversations": [*talk, pair["chosen"]]}, []),
        ({"prompt": "Sky?", "completion": "Blue."}, []),
        ({"prompt": user("Sky?")}, []),
    ):
        (record,) = load_dataset_records(lines(tmp_path / "a.jsonl", {**row, "system": "Be a cat."}))
        assert (record.query, record.extra) == ([system, *query, *user("Sky?")], {})
    # A conversation that begins with a system message of its own keeps it alone, as in LLaMA-Factory.
    (record,) = load_dataset_records(
        lines(tmp_path / "b.jsonl", {"conversations": [theirs, *talk], **pair, "system": "s"})
    )
    assert record.query == [{"role": "system", "content": "Be a dog."}, *user("Sky?")]
    counts = Counter[str]()
    rows = [{"instruction": "a", "output": "b", "history": h} for h in (None, [["x"]], "x")]
    assert len(list(load_dataset_records(lines(tmp_path / "c.jsonl", *rows), counts=counts))) == 1
    assert counts == {"`history` is no list of pairs of texts": 2}


def test_responses_that_no_format_reads_are_not_left_behind_unasked(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "1 2", "output_1": "3", "output_2": "4"})
    with pytest.raises(
        UserError, match=r"reads the responses in output_1, output_2: give --format pkg.* --format prompts"
    ):
        list(load_dataset_records(path))
    (record,) = load_dataset_records(path, "prompts")
    assert record.query == user("Add.\n\n1 2")
    for prompt, name in (
        ("prompt", "response"), ("question", "output"), ("instruction", "completion"), ("prompt", "responses"),
    ):  # fmt: skip
        path = lines(tmp_path / "b.jsonl", {prompt: "Add.", name: "3"})
        with pytest.raises(UserError, match=f"reads the responses in {name}: give --format pkg.* --format prompts"):
            list(load_dataset_records(path))
    (record,) = load_dataset_records(lines(tmp_path / "c.jsonl", {"question": "1 + 2?", "answer": "3"}))
    assert record.extra == {"answer": "3"}  # what rewards hold responses against


def test_dolly(tmp_path: Path) -> None:
    """Its context is part of the query; also without a response it is not left behind unasked."""
    rows = [
        {"instruction": "Who?", "context": "Ann ran.", "response": "Ann.", "category": "closed_qa"},
        {"instruction": "Sing.", "context": "", "response": "La.", "category": "open_qa"},
        {"instruction": "Add.", "input": "1 2", "response": "3"},
        {"instruction": "Add.", "input": "1 2", "context": "Sums.", "response": "3"},
    ]
    counts = Counter[str]()
    first, second, third = load_dataset_records(lines(tmp_path / "a.jsonl", *rows), counts=counts)
    assert first == Record(query=user("Who?\n\nAnn ran."), responses=["Ann."], extra={"category": "closed_qa"})
    assert (second.query, third.query) == (user("Sing."), user("Add.\n\n1 2"))
    assert counts == {"both `context` and `input`": 1}
    path = lines(tmp_path / "b.jsonl", {"instruction": "Who?", "context": "Ann ran."})
    with pytest.raises(UserError, match=r"reads the context beside instruction: give --format pkg"):
        list(load_dataset_records(path))


def test_alpaca_and_alpacafarm_and_vicuna(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La."},
    )
    first, second = load_dataset_records(path)
    assert (first.query, first.responses, first.scores) == (user("Add.\n\n1 2"), ["3"], [])
    assert second.query == user("Sing.")

    outputs = {"sft": "3", "rlhf": "three", "absent": None, "silent": ""}
    path = lines(tmp_path / "b.jsonl", {"instruction": "Add.", "input": "1 2", "outputs": outputs})
    counts = Counter[str]()
    (record,) = load_dataset_records(path, counts=counts)
    assert (record.responses, record.sources) == (["3", "three"], ["system/sft", "system/rlhf"])
    assert counts == {"empty response dropped": 1}

    path = lines(tmp_path / "c.jsonl", {"question_id": 4, "category": "generic", "turns": ["How?"]})
    (record,) = load_dataset_records(path)
    assert record == Record(query=user("How?"), extra={"question_id": 4, "category": "generic"})


def test_a_prompt_that_the_completions_repeat_in_part() -> None:
    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    system, first, answer, second = said("system", "s"), said("user", "1"), said("assistant", "a"), said("user", "2")
    good, bad = said("assistant", "good"), said("assistant", "bad")
    for prompt, shared, query in (
        ([first], [first, answer, second], [first, answer, second]),  # they hold the whole dialogue
        ([system, first], [first], [system, first]),  # the prompt begins earlier
        ([system, first], [answer, second], [system, first, answer, second]),  # they go on where it ends
        ([first], [], [first]),
    ):
        row = FORMATS["preference"]({"prompt": prompt, "chosen": [*shared, good], "rejected": [*shared, bad]})
        assert row is not None and row["query"] == query and row["responses"] == ["good", "bad"]


def test_reviews_and_prompts_out_of_csv_and_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"Good, they ""said"".\nYes.",1\nBad.,0\n', encoding="utf-8")
    first, second = load_dataset_records(tmp_path / "a.csv")
    assert (first.query, first.extra) == ('Good, they "said".\nYes.', {"label": "1"})
    assert second.query == "Bad."
    (tmp_path / "b.txt").write_text("One day\n\nTwo \n", encoding="utf-8")
    assert [record.query for record in load_dataset_records(tmp_path / "b.txt")] == ["One day", "Two"]
    path = lines(tmp_path / "c.jsonl", {"prompt": user("x")}, {"instruction": "y"}, {"other": 1})
    counts = Counter[str]()
    assert [r.query for r in load_dataset_records(path, "prompts", counts=counts)] == [user("x"), user("y")]
    assert counts.total() == 1
    (tmp_path / "d.csv").write_text("text\na,b\n")
    with pytest.raises(UserError, match="line 2: more cells"):
        list(load_dataset_records(tmp_path / "d.csv"))


def test_dirty_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    def pair(chosen: str, rejected: str) -> dict[str, str]:
        return {"chosen": chosen, "rejected": rejected}

    path = lines(
        tmp_path / "a.jsonl",
        pair(DIALOGUE + " a", DIALOGUE + " b"),
        pair(DIALOGUE + " a", DIALOGUE + " b\n\nHuman: c\n\nAssistant: d"),
        pair(DIALOGUE + " a", DIALOGUE + " "),
        pair(DIALOGUE + " ", DIALOGUE + ""),
        pair("a", "b"),
        pair(DIALOGUE + " a", DIALOGUE + " a"),
        {"chosen": DIALOGUE},
        [1],
    )
    counts = Counter[str]()
    first, second = load_dataset_records(path, "hh", counts=counts)
    assert first.responses == [" a", " b"]
    assert (second.responses, second.sources, second.scores) == ([" a"], ["human/chosen"], [1.0])
    assert second.id == content_id(DIALOGUE) + "-2"
    assert counts == {
        "the two dialogues part before the last turn": 1,
        "empty response dropped": 3,
        "no response left": 1,
        "a dialogue without an Assistant turn": 1,
        "chosen and rejected are the same": 1,
        "no `rejected`": 1,
        "a row that is no object": 1,
    }


@pytest.mark.parametrize("speaker", [["human"], {"name": "human"}, 1, None])
def test_a_speaker_that_is_no_text_is_counted(speaker: Any, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"conversations": talk}, {"conversations": [{"from": speaker, "value": "a"}, talk[1]]}]
    counts: Counter[str] = Counter()
    assert len(list(load_dataset_records(lines(tmp_path / "a.jsonl", *rows), counts=counts))) == 1
    assert counts == {"`conversations` is no list of turns from human, gpt or system": 1}


def test_messages_that_are_no_pair_are_counted(tmp_path: Path) -> None:
    two = [assistant("a"), *user("b")]
    path = lines(
        tmp_path / "a.jsonl",
        {"prompt": "q", "chosen": two, "rejected": [assistant("c")]},
        {"prompt": "q", "chosen": "a", "rejected": [assistant("c")]},
        {"prompt": [{"role": "user"}], "chosen": [assistant("a")], "rejected": [assistant("c")]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    )
    counts = Counter[str]()
    assert len(list(load_dataset_records(path, "preference", counts=counts))) == 1
    assert counts.total() == 3 and len(counts) == 3


def test_ids_of_theirs_are_kept_and_made_unique(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"id": i, "prompt": "p"} for i in (7, "x", 7, None, 1.5)))
    ids = [record.id for record in load_dataset_records(path)]
    assert ids == ["7", "x", "7-2", content_id("p"), content_id("p") + "-2"]


def test_guesses() -> None:
    for name, (row, _) in CASES.items():
        expected = "hh" if name == "hh-chat" else name.split(",")[0]
        assert guess_format(row, "file") == expected
    assert guess_format({"query": "q", "responses": ["a"]}, "file") == "rrhf"
    assert guess_format({"text": "t", "label": 1}, "file") == guess_format({"review": "t"}, "file") == "imdb"
    assert guess_format({"text": "t"}, "file") == "prompts"
    with pytest.raises(
        UserError, match=r"file: cannot tell the format from the columns a, b\. Each needs:\n"
    ) as caught:
        guess_format({"a": 1, "b": 2}, "file")
    for line in ("alpacafarm: instruction, outputs", "hh-chat: chosen, rejected", "imdb: label, text or review"):
        assert f"\n  {line}\n" in str(caught.value)


def test_a_format_is_told_by_several_rows(tmp_path: Path) -> None:
    """The first row's null had made bare prompts of Alpaca's rows, without the responses of all the others."""
    full = [{"instruction": f"Do {i}.", "input": "", "output": f"Done {i}."} for i in range(3)]
    for number, first in enumerate(({"instruction": "Do.", "input": "", "output": None}, {"instruction": "Do."})):
        path, counts = lines(tmp_path / f"{number}.jsonl", first, *full), Counter[str]()
        records = list(load_dataset_records(path, counts=counts))
        assert [record.responses for record in records] == [["Done 0."], ["Done 1."], ["Done 2."]]
        assert counts == {"no `output`": 1}
    pairs = lines(tmp_path / "pairs.jsonl", {"chosen": None, "rejected": "a"}, CASES["hh"][0])
    assert [record.responses for record in load_dataset_records(pairs)] == [[" A bot.", " A man."]]
    late = lines(tmp_path / "late.jsonl", {"prompt": "p"}, {"prompt": "q", "response": "a"})
    with pytest.raises(UserError, match="no format is known that reads the responses in response"):
        list(load_dataset_records(late))


def test_a_broken_row_behind_the_limit_is_not_read(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"prompt": f"p{i}"} for i in range(3)))
    path.write_text(path.read_text() + "{\n" + '{"prompt": "last"}\n')
    assert len(list(load_dataset_records(path, limit=3))) == 3
    with pytest.raises(UserError, match="line 4: not JSON"):
        list(load_dataset_records(path))


def test_own_records_pass_and_their_faults_stay_errors(tmp_path: Path) -> None:
    rows = [Record(query="q", responses=["a", "b"], scores=[1.0, None], finish=["stop", "length"], extra={"n": 1})]
    write_records(tmp_path / "a.parquet", rows)
    assert list(load_dataset_records(tmp_path / "a.parquet")) == rows
    counts = Counter[str]()
    path = lines(tmp_path / "b.jsonl", {"query": "q", "responses": ["a", ""], "scores": [1, 2]}, {"query": "r"})
    assert [record.responses for record in load_dataset_records(path, counts=counts)] == [["a"], []]
    assert counts == {"empty response dropped": 1}
    path = lines(tmp_path / "c.jsonl", {"query": "q"}, {"query": "q", "responses": ["a"], "scores": [math.nan]})
    with pytest.raises(UserError, match=r"c\.jsonl, line 2: scores\[0\] is NaN"):
        list(load_dataset_records(path))


def test_outsiders_bring_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_format.py").write_text(
        "def read(row):\n    return {'query': row['q'], 'responses': [row['a']]} if row['a'] != 'skip' else None\n"
    )
    monkeypatch.chdir(tmp_path)
    path = lines(tmp_path / "a.jsonl", {"q": "x", "a": "y"}, {"q": "x", "a": "skip"})
    counts = Counter[str]()
    (record,) = load_dataset_records(path, "their_format:read", counts=counts)
    assert (record.query, record.responses) == ("x", ["y"])
    assert counts == {"skipped by the format": 1}
    with pytest.raises(UserError, match=r"format .*their_format has no 'wrong'"):
        load_format("their_format:wrong")
    with pytest.raises(UserError, match=r"format .*no module 'no_such_module'"):
        load_format("no_such_module:read")


def test_a_function_that_fails_is_named_with_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_format.py").write_text(
        "from rrhf.records.foreign.rows import SkipRowError\n\n\n"
        "def read(row):\n    if row['q'] == 'skip':\n        raise SkipRowError('no use')\n"
        "    return {'query': row['x']}\n"
    )
    monkeypatch.chdir(tmp_path)
    path = lines(tmp_path / "a.jsonl", {"q": "skip"}, {"q": "y"})
    with pytest.raises(
        UserError, match=r"a\.jsonl, line 2: format 'failing_format:read' failed: KeyError: 'x' \(in read, .*line 7\)"
    ):
        list(load_dataset_records(path, "failing_format:read"))


def test_errors_come_before_reading(tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", {"prompt": "p"})
    with pytest.raises(UserError, match=r"unknown format 'alpca': did you mean 'alpaca'\? known: alpaca, "):
        load_dataset_records(path, "alpca")
    with pytest.raises(UserError, match=r"no such file: did you mean .*data\.jsonl"):
        load_dataset_records(tmp_path / "date.jsonl")
    with pytest.raises(UserError, match="limit is 0"):
        load_dataset_records(path, limit=0)


def test_nothing_usable_is_an_error_with_reasons(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "p"}, {"prompt": "q"})
    said = r"no row gave a record: no `chosen` \(2\); the first has the columns prompt; hh needs chosen, rejected: "
    with pytest.raises(UserError, match=said):
        list(load_dataset_records(path, "hh"))
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no rows"):
        list(load_dataset_records(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="no such file or folder"):
        list(load_dataset_records(tmp_path / "folder"))


def test_limit_counts_records(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"prompt": text} for text in ("a", " ", "b", "c")))
    assert [record.query for record in load_dataset_records(path, limit=2)] == ["a", "b"]


def test_folder_through_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl", *({"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(5)))
    lines(folder / "test.jsonl", {"prompt": "t", "chosen": "a", "rejected": "b"})
    assert [r.query for r in load_dataset_records(folder, limit=3)] == ["p0", "p1", "p2"]
    assert [r.query for r in load_dataset_records(folder, split="test")] == ["t"]
    with pytest.raises(UserError, match="cannot read split 'dev'"):
        list(load_dataset_records(folder, split="dev"))


def test_records_in_a_folder_of_parquet_files_come_back_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of unlike columns, and queries of text and messages in one file, which stand in it as JSON."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    first = [Record("text", ["a", "b"]), Record(user("hello"), ["c"], extra={"topic": {"of": ["greetings"]}})]
    second = [Record("more", ["a", "b"], scores=[1.0, None])]
    write_records(folder / "train-00000-of-00002.parquet", first)
    write_records(folder / "train-00001-of-00002.parquet", second)
    write_records(folder / "test.parquet", second)
    assert list(load_dataset_records(folder)) == [*first, *second]
    assert list(load_dataset_records(folder, split="test")) == second
    assert list(load_dataset_records(folder, limit=1)) == first[:1]
    with pytest.raises(UserError, match="cannot read split 'dev'"):
        list(load_dataset_records(folder, split="dev"))
    (folder / "train-00001-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet: not a whole Parquet file"):
        list(load_dataset_records(folder))


def test_every_format_has_its_line() -> None:
    assert all(function.__doc__ for function in FORMATS.values())
    assert {name for _, name in COLUMNS} == set(FORMATS)  # an error can say what each needs


# --- real data ---------------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Path:
    folder = os.environ.get("RRHF_TEST_DATA")
    if not folder:
        pytest.skip("RRHF_TEST_DATA is not set: the real data sets are not in the repository")
    return Path(folder)


@pytest.mark.parametrize("format", [None, "hh-chat"])
def test_real_hh(real: Path, tmp_path: Path, format: str | None) -> None:
    counts = Counter[str]()
    records = list(load_dataset_records(real / "hh_harmless.jsonl.gz", format, counts=counts))
    assert len(records) == 1800 - 4
    assert counts == {"the two dialogues part before the last turn": 4, "empty response dropped": 3}
    assert sum(len(record.responses) for record in records) == 2 * 1796 - 3
    assert [record.id for record in records if "-" in record.id] == [
        f"{content_id(record.query)}-2" for record in records if "-" in record.id
    ]
    assert sum("-" in record.id for record in records) == 1
    if format is None:
        assert all(isinstance(r.query, str) and r.query.endswith("\n\nAssistant:") for r in records)
        assert all(response.startswith(" ") for record in records for response in record.responses)
    else:
        assert all(isinstance(r.query, list) and r.query[-1]["role"] == "user" for r in records)
    write_records(tmp_path / "a.parquet", records)
    assert list(read_records(tmp_path / "a.parquet", require="scores")) == records


def test_real_alpacafarm_and_vicuna(real: Path) -> None:
    records = list(load_dataset_records(real / "alpacafarm_systems.jsonl"))
    assert len(records) == 252
    assert all(len(record.responses) == 4 and record.scores == [] for record in records)
    assert {source for record in records for source in record.sources} == {
        "system/baseline",
        "system/sft",
        "system/rlhf",
        "system/gpt-3.5-turbo-0301",
    }
    assert len(list(load_dataset_records(real / "vicuna_questions.jsonl"))) == 80
