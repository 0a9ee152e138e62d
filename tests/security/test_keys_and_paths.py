"""Keys that are never written anywhere, names in files that lead nowhere else, texts that stay texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.common.files import inside
from rrhf.report import load
from rrhf.report.card import write_card
from support import misbehaving as bad
from support import tiny

KEY = "sk-planted-0123456789abcdef"
IN_URL = "hunter2planted"
PRICE = "price: [1, 2]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bad.Misbehaving]]:
    with bad.misbehaving() as server:
        folder = tmp_path_factory.mktemp("keys")
        tiny.write_model(folder / "model")
        yield folder, server


def holding(folder: Path, *words: str) -> list[str]:
    """The files in which one of the words stands, also where it is part of a name."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        if any(word.encode() in content or word in path.name for word in words):
            found.append(str(path.relative_to(folder)))
    return found


def a_run(folder: Path, url: str, model: Path) -> Path:
    """A configuration whose responses come from a server, too."""
    settings = tiny.config(model)
    settings["data"] = {"source": "data.jsonl", "limit": 4, "held_out_limit": 2}
    settings["sample"] = {"source": [f"{url}@chat:2"], "max_new_tokens": 4, "max_retries": 1}
    settings["train"] |= {"num_train_epochs": 1, "save_strategy": "no"}
    settings["evaluate"] |= {"max_new_tokens": 4, "reward": ["tiny_rewards:vowels"]}
    return tiny.workplace(folder, settings, tiny.rows(6))


def test_a_whole_run_writes_no_key(place: tuple[Path, bad.Misbehaving]) -> None:
    """The key stands in the environment; the server gets it, and nobody reads it in the folder or on the screen."""
    folder, server = place
    work = a_run(folder / "run", server.url, folder / "model")
    server.plan = [bad.echo_key(429)]  # said to us by a server that repeats it
    command = ("run", "config.yaml", "--output", "out")
    ended = tiny.warm(*command, cwd=work, env={"OPENAI_API_KEY": KEY, "RRHF_API_KEY": KEY}).done()
    assert any(KEY in headers.get("authorization", "") for headers in server.headers)  # it was used
    assert KEY not in ended.out + ended.err
    assert holding(work, KEY) == []
    assert (work / "out/model/README.md").exists() and (work / "out/report.html").exists()


@pytest.mark.parametrize("answer", [bad.echo_key(401), bad.echo_key(500)])
def test_no_message_repeats_the_key(answer: bad.Behaviour, place: tuple[Path, bad.Misbehaving], tmp_path: Path) -> None:
    folder, server = place
    work = a_run(tmp_path / "run", server.url, folder / "model")
    server.default, before = answer, server.default
    command = ("run", "config.yaml", "--output", "out")
    ended = tiny.warm(*command, cwd=work, env={"OPENAI_API_KEY": KEY, "RRHF_API_KEY": KEY})
    server.default = before
    assert ended.code == 2 and "Incorrect API key provided" in ended.err
    assert KEY not in ended.out + ended.err and holding(work, KEY) == []


def test_a_judge_whose_url_holds_a_password(place: tuple[Path, bad.Misbehaving], tmp_path: Path) -> None:
    """It is refused, or used and shown nowhere; the file that the user wrote it into is the only one that has it."""
    url = place[1].url.replace("http://", f"http://user:{IN_URL}@")
    work = tiny.workplace(tmp_path / "judge", {}, tiny.rows(3))
    (work / "judge.yaml").write_text(f"url: {url}\nmodel: m\ntries: 1\n{PRICE}", encoding="utf-8")
    command = ("score", "--data", "data.jsonl", "--reward", "judge:judge.yaml", "--output", "scored.jsonl")
    ended = tiny.warm(*command, "--max_retries", "0", cwd=work)
    assert "Traceback" not in ended.err and IN_URL not in ended.out + ended.err
    assert holding(work, IN_URL) == ["judge.yaml"]


def test_a_source_whose_url_holds_a_password(place: tuple[Path, bad.Misbehaving], tmp_path: Path) -> None:
    url = place[1].url.replace("http://", f"http://user:{IN_URL}@")
    work = tiny.workplace(tmp_path / "source", {}, tiny.rows(3))
    command = (
        "sample",
        "--data",
        "data.jsonl",
        "--source",
        f"{url}@chat:1",
        "--output",
        "o.jsonl",
    )
    ended = tiny.warm(*command, "--max_retries", "0", cwd=work)
    assert "Traceback" not in ended.err and IN_URL not in ended.out + ended.err
    assert holding(work, IN_URL) == []


@pytest.mark.parametrize(
    "command",
    [
        ("run", "config.yaml", "train.hub_token={key}", "--output", "out"),
        ("run", "config.yaml", "hub_token={key}", "--output", "out"),
        ("train", "--model", "m", "--data", "data.jsonl", "--output", "out", "--hub_token", "{key}"),
        ("train", "--model", "m", "--data", "data.jsonl", "--output", "out", "--push_to_hub_token={key}"),
        ("reward-model", "--model", "m", "--data", "data.jsonl", "--output", "out", "--hub-token={key}"),
    ],
)
def test_a_token_of_the_hub_is_no_flag_and_no_key(
    command: tuple[str, ...], place: tuple[Path, bad.Misbehaving], tmp_path: Path
) -> None:
    """Settings are written into files: config.yaml, report.html, training_args.bin."""
    work = a_run(tmp_path / "work", place[1].url, place[0] / "model")
    ended = tiny.warm(*(word.format(key=KEY) for word in command), cwd=work)
    assert ended.code == 2 and KEY not in ended.out + ended.err
    assert ("HF_TOKEN" in ended.err) is ("push_to_hub_token" not in command[-1]), ended.err
    assert holding(work, KEY) == [] and not (work / "out").exists()


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..", "a\x00b", "", "link/x"])
def test_a_name_in_a_file_leads_to_no_other_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out of"):
        inside(folder, name)
    assert inside(folder, "evaluation.generations.jsonl") == folder / "evaluation.generations.jsonl"


def test_a_run_of_somebody_else_cannot_show_our_files(tmp_path: Path) -> None:
    """A report of a run folder that was sent to us reads nothing beside it."""
    secret = tmp_path / "secret.jsonl"
    secret.write_text(json.dumps({"query": "our password", "rho": "a", "pi": "b"}) + "\n", encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    (run / "evaluation.json").write_text(json.dumps({"generations": "../secret.jsonl"}), encoding="utf-8")
    found = load.load_run(run)
    assert not found.generations and "password" not in repr(found)


def test_a_training_of_somebody_else_cannot_show_our_files(tmp_path: Path) -> None:
    """What a training was made of lies outside its folder; it is read where it is what the folder says it was."""
    ours, folder = tmp_path / "ours.jsonl", tmp_path / "sent"
    tiny.write_rows(ours, tiny.rows(4, responses=2))
    folder.mkdir()
    (folder / "training.json").write_text("{}", encoding="utf-8")
    for more in ({}, {"data_checksum": "ef" * 32}):
        settings = json.dumps({"data": str(ours), **more})
        (folder / "training-settings.json").write_text(settings, encoding="utf-8")
        found = load.load_run(folder)
        assert found.samples is None and found.missing["samples"].startswith("ours.jsonl is missing, or holds")


def test_ids_and_sources_name_no_files(tmp_path: Path) -> None:
    """Whatever a record is called, what is written lies where it was asked for."""
    work = tiny.workplace(tmp_path / "work", {})
    rows = tiny.rows(3)
    for row, name in zip(rows, ("../../escaped", "/tmp/escaped-planted", "..\\escaped"), strict=True):
        row["id"], row["sources"] = name, [f"{name}/0", f"{name}/1"]
    tiny.write_rows(work / "data.jsonl", rows)
    tiny.warm(
        "score", "--data", "data.jsonl", "--reward", "tiny_rewards:vowels", "--output", "o.jsonl", cwd=work
    ).done()
    tiny.warm("inspect", "o.jsonl", "--output", "page.html", cwd=work)
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/tmp/escaped-planted").exists()


# --- texts that stay texts ------------------------------------------------------------------------------------------


HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[click](javascript:alert(1))", "![x](http://evil/x)",
    "| a | b |\n| - | - |", "# heading", "`code`", "---\nmodel: evil\n---", "{{ 7 * 7 }}", "</title><script>",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_model_card_quotes_hostile_names(text: str, tmp_path: Path) -> None:
    """A base model's and a reward's name, and a source, come from outside: the card's own form stays what it is."""
    import yaml

    folder = tmp_path / "run" / "model"
    tiny.write_model(folder)
    flat = " ".join(text.split())
    training = {
        "settings": {"model": flat, "learning_rate": 1e-5, "ranking_loss": "rrhf"}, "records": 3, "steps": 2,
        "data": {f"{flat}/0": 0.5, "human/0": 0.5}, "train_loss": 1.0, "path": "tree", "precision": "fp32",
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(training), encoding="utf-8")
    write_card(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    head, body = card.split("\n---\n", 1)
    assert isinstance(yaml.safe_load(head.removeprefix("---\n")), dict)
    for bad_form in ("<script", "<img", "](javascript:", "![x]("):
        assert bad_form not in _outside_code(body), body


def _outside_code(markdown: str) -> str:
    """The text without code, in which nothing is read as Markdown or HTML."""
    import re

    text = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    text = re.sub(r"(`+)[^`].*?\1", "", text)
    return text.replace("\\<", "").replace("\\[", "").replace("\\!", "")


def test_hostile_texts_in_the_page_of_a_file(tmp_path: Path) -> None:
    work = tiny.workplace(tmp_path / "work", {})
    rows: list[dict[str, Any]] = tiny.rows(len(HOSTILE))
    for row, text in zip(rows, HOSTILE, strict=True):
        row["query"], row["responses"], row["sources"] = f"{text} {row['id']}", [text, text + "."], [text, "b/1"]
    tiny.write_rows(work / "data.jsonl", rows)
    ended = tiny.warm("inspect", "data.jsonl", "--output", "page.html", cwd=work)
    if ended.code == 0:
        page = (work / "page.html").read_text(encoding="utf-8")
        assert "<script>alert" not in page and "<img src=x" not in page
