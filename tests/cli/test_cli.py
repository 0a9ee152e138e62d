"""The command line: bad input gets a clear error with exit code 2, and what was there before stays."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rrhf import __version__
from rrhf.cli.main import COMMANDS, main
from support import tiny


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Commands run in this process: what they set up goes again. Each test has a folder of its own to be in."""
    log, handler = logging.getLogger("rrhf"), signal.getsignal(signal.SIGTERM)
    before, level, propagate, path = list(log.handlers), log.level, log.propagate, list(sys.path)
    for other in logging.getLogger("transformers").handlers:  # not to what an earlier test has captured and closed
        if type(other) is logging.StreamHandler:
            monkeypatch.setattr(other, "stream", sys.__stderr__)
    tiny.write_rewards(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    yield
    log.handlers[:], log.level, log.propagate, sys.path[:] = before, level, propagate, path
    sys.modules.pop("tiny_rewards", None)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; what it says."""

    def run(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return run


def score_to(output: str = "out.jsonl", data: str = "data.jsonl") -> list[str]:
    return ["score", "--data", data, "--reward", "tiny_rewards:vowels", "--output", output]


def sample(model: Path, *more: object) -> list[object]:
    flags = ["--model", model, "--device", "cpu", "--dtype", "float32", "--data", "data.jsonl", "--output", "out.jsonl"]
    return ["sample", *flags, "--max_new_tokens", 3, *more]


def train(model: Path, *more: object) -> list[object]:
    return ["train", "--model", model, "--device", "cpu", "--data", "data.jsonl", "--output", "trained", *more]


# --- rows ------------------------------------------------------------------------------------------------------------


def broken(**changes: Any) -> str:
    """A file of 20 rows whose line 17 is another."""
    rows = tiny.rows(20)
    rows[16] = {name: value for name, value in {**rows[16], **changes}.items() if value is not ...}
    return "".join(json.dumps(row) + "\n" for row in rows)


def raw(line: str) -> str:
    lines = broken().splitlines()
    return "\n".join([*lines[:16], line, *lines[17:]]) + "\n"


BAD_ROWS = {
    "not JSON": (raw('{"query": "a", "responses": ["b"'), ["line 17", "not JSON", "mend the line"]),
    "not an object": (raw("[1]"), ["line 17", "a list", "query"]),
    "no query": (broken(query=...), ["line 17", "no query", "rrhf convert"]),
    "empty query": (broken(query="  "), ["line 17", "the query is empty", "fill it in or take the row out"]),
    "empty message": (broken(query=[{"role": "user", "content": ""}]), ["line 17", "the query is empty"]),
    "no responses": (broken(responses=..., sources=..., finish=..., scores=...), ["line 17", "no resp", "rrhf sample"]),
    "empty response": (broken(responses=["a", " "]), ["line 17", "response 1 is empty", "rrhf convert"]),
    "lengths differ": (broken(scores=[0.5]), ["line 17", "scores and responses differ in length (1 and 2)"]),
    "sources differ": (broken(sources=["a"]), ["line 17", "sources and responses differ in length (1 and 2)"]),
    "NaN": (broken(scores=[0.5, float("nan")]), ["line 17", "scores[1] is NaN", "null for a response"]),
    "infinite": (broken(scores=[float("-inf"), 1]), ["line 17", "scores[0] is infinite", "finite number"]),
    "text": (broken(scores=[0.5, "good"]), ["line 17", "scores[1] is text", "finite number"]),
    "reward": (broken(rewards={"f": [None, True]}), ["line 17", "rewards 'f'[1] is true or false", "finite number"]),
    "finish": (broken(finish=["stop", "done"]), ["line 17", "finish is 'done'", "'stop' or 'length'"]),
    "id twice": (broken(id="q3"), ["line 17", "'q3'", "line 4 already"]),
    "empty file": ("", ["holds no records"]),
    "blank file": ("\n\n", ["holds no records"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(case: str, refused: Callable[..., str]) -> None:
    content, words = BAD_ROWS[case]
    Path("data.jsonl").write_text(content, encoding="utf-8")
    said = refused(*score_to())
    for word in ["rrhf score: ", "data.jsonl", *words]:
        assert word in said
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize("case", ["not JSON", "NaN", "empty query", "empty file"])
def test_a_bad_row_stops_sampling_and_training_too(case: str, refused: Callable[..., str], model: Path) -> None:
    content, words = BAD_ROWS[case]
    Path("data.jsonl").write_text(content, encoding="utf-8")
    for command in (sample(model), train(model)):
        said = refused(*command)
        assert all(word in said for word in ["data.jsonl", *words])
    assert not Path("out.jsonl").exists()
    said = refused("inspect", "data.jsonl")
    assert all(word in said for word in ["data.jsonl", *words])


def test_after_a_bad_row_is_mended_the_command_goes_on(refused: Callable[..., str]) -> None:
    Path("data.jsonl").write_text(BAD_ROWS["not JSON"][0], encoding="utf-8")
    refused(*score_to())
    Path("data.jsonl").write_text(broken(), encoding="utf-8")
    refused(*score_to(), code=0)
    assert [row["id"] for row in tiny.read_rows(Path("out.jsonl"))] == [f"q{i}" for i in range(20)]
    assert sorted(path.name for path in Path().iterdir()) == ["data.jsonl", "out.jsonl", "tiny_rewards.py"]


def test_a_missing_file_and_an_unknown_suffix(refused: Callable[..., str]) -> None:
    Path("data.jsonl").write_text(broken())
    said = refused(*score_to(data="dat.jsonl"))
    assert "dat.jsonl: no such file: did you mean data.jsonl?" in said
    assert "out.json: unknown suffix" in (said := refused(*score_to("out.json"))) and ".parquet" in said
    Path("folder.jsonl").mkdir()
    assert "folder.jsonl: is a folder" in refused(*score_to(data="folder.jsonl"))


def test_training_needs_scores(refused: Callable[..., str], model: Path) -> None:
    tiny.write_rows(Path("data.jsonl"), tiny.rows(3, scores=False))
    assert "data.jsonl, line 1: no scores: run `rrhf score` first" in refused(*train(model))


# --- queries ---------------------------------------------------------------------------------------------------------


def test_a_query_longer_than_the_limit_is_cut_counted_and_said(refused: Callable[..., str], model: Path) -> None:
    rows = tiny.rows(6, responses=0)
    for row in rows[:2]:
        row["query"] *= 20
    tiny.write_rows(Path("data.jsonl"), rows)
    said = refused(*sample(model))  # a context of 128 tokens
    assert "context of 128" in said and "--max_query_length 125" in said
    said = refused(*sample(model, "--max_query_length", 120), code=0)
    assert "2 queries were cut to --max_query_length 120" in said
    assert [row["query"] for row in tiny.read_rows(Path("out.jsonl"))] == [row["query"] for row in rows]


def test_messages_without_a_chat_template(refused: Callable[..., str], tmp_path: Path) -> None:
    plain = tiny.write_model(tmp_path / "plain", chat=False)
    tiny.write_rows(Path("data.jsonl"), tiny.rows(2, messages=True))
    assert "no chat template" in (said := refused(*sample(plain))) and "plain text" in said


# --- names -----------------------------------------------------------------------------------------------------------


def test_an_unknown_command(refused: Callable[..., str]) -> None:
    said = refused("smaple")
    assert "unknown command 'smaple': did you mean 'sample'?" in said and "evaluate" in said


@pytest.mark.parametrize("flag", ["--num_respones", "--num-respones", "--num-respones=4"])
def test_an_unknown_flag(flag: str, refused: Callable[..., str], model: Path) -> None:
    said = refused(*sample(model, flag, 3))
    assert f"unknown flag {flag.partition('=')[0]}" in said and "did you mean '--num_responses'?" in said


@pytest.mark.parametrize(
    ("command", "wrong", "right"),
    [
        (["score", "--data", "d", "--output", "o", "--reward", "provided"], "--reward-weigth", "--reward_weights"),
        (["train", "--model", "m", "--data", "d", "--output", "o"], "--learning-rat", "--learning_rate"),
        (["evaluate", "--model", "m", "--data", "d", "--output", "o", "--reward", "provided"], "--sed", "--seed"),
    ],
)
def test_an_unknown_flag_of_the_other_commands(
    command: list[str], wrong: str, right: str, refused: Callable[..., str]
) -> None:
    said = refused(*command, wrong, "1")
    assert f"unknown flag {wrong}: did you mean {right!r}?" in said


TRAIN = ["train", "--model", "m", "--data", "d.jsonl", "--output", "o"]
REWARD_MODEL = ["reward-model", *TRAIN[1:]]
PPO = ["baseline", "ppo", *TRAIN[1:], "--reward", "tiny_rewards:vowels"]
BEST_OF_N = ["baseline", "best-of-n", *PPO[2:]]
EVALUATE = ["evaluate", *TRAIN[1:], "--reward", "tiny_rewards:vowels"]
REWARDS = ["score.reward=[tiny_rewards:vowels]", "evaluate.reward=[tiny_rewards:vowels]"]
NONSENSE: dict[str, tuple[list[str], str]] = {
    "train, a seed": ([*TRAIN, "--seed", "-1"], "--seed -1: must lie between 0 and 4294967295"),
    "evaluate, a seed": ([*EVALUATE, "--seed", "-1"], "--seed -1: must lie between"),
    "train, a rate": ([*TRAIN, "--learning_rate", "-1"], "--learning_rate -1.0: must be at least 0"),
    "train, no number": ([*TRAIN, "--learning_rate", "nan"], "--learning_rate nan: must be at least 0"),
    "train, steps": ([*TRAIN, "--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0: must be at le"),
    "train, no step": ([*TRAIN, "--max_steps", "0"], "--max_steps 0: nothing would be trained"),
    "train, no epoch": ([*TRAIN, "--num_train_epochs", "0"], "--num_train_epochs 0: nothing would be trained"),
    "reward-model, no step": ([*REWARD_MODEL, "--max_steps", "0"], "--max_steps 0: nothing would be trained"),
    "train, workers": ([*TRAIN, "--dataloader_num_workers", "-1"], "--dataloader_num_workers -1: must be at least 0"),
    "train, lines": ([*TRAIN, "--logging_steps", "0"], "--logging_steps"),
    "train, Adam": ([*TRAIN, "--adam_beta1", "7"], "--adam_beta1 7.0: must lie in [0, 1)"),
    "train, nothing held out": ([*TRAIN, "--eval_strategy", "steps"], "--eval_strategy steps: nothing is held out"),
    "train, no adapter": ([*TRAIN, "--lora-r", "4"], "--lora_r is for an adapter: give --peft too"),
    "ppo, no adapter": ([*PPO, "--lora_alpha=4"], "--lora_alpha is for an adapter: give --peft too"),
    "sft, no adapter": (["baseline", "sft", *TRAIN[1:], "--lora_r", "4"], "--lora_r is for an adapter: give --peft"),
    "train, none held out": ([*TRAIN, "--eval_steps", "1"], "--eval_steps is for held-out records: give --eval_data"),
    "reward-model, none held out": ([*REWARD_MODEL, "--eval_steps", "1"], "--eval_steps is for held-out records"),
    "reward-model, a rate": ([*REWARD_MODEL, "--learning_rate", "-1"], "--learning_rate -1.0: must be at least 0"),
    "ppo, a folder": ([*PPO, "--data", "folder"], "folder: is a folder: name the file in it"),
    "best-of-n, a folder": ([*BEST_OF_N, "--data", "folder"], "folder: is a folder: name the file in it"),
    "score, a folder": (score_to(data="folder"), "folder: is a folder: name the file in it"),
    "score, into a folder": (score_to("folder"), "folder: is a folder: name the file in it"),
    "score, nowhere": (score_to(""), "--output: is empty"),
    "train, nowhere": ([*TRAIN, "--output", ""], "--output: is empty"),
    "train, of nothing": ([*TRAIN, "--data", ""], "--data: is empty"),
    "report, of nothing": (["report", "", "--output", "o.html"], "runs is empty"),
    "publish, nothing": (["publish", "", "--to", "card"], "source is empty"),
    "run, a list for a number": (
        ["run", "hh-dp", "--output", "o", "train.learning_rate=[1, 2]"],
        "learning_rate: takes o",
    ),
    "run, keys for a name": (["run", "hh-dp", "--output", "o", "model={a: 1}"], "model: takes a value, not keys"),
    "run, a limit": (["run", "hh-dp", "--output", "o", "data.limit=-3"], "--limit -3: must be at least 1"),
    "run, no overrides": (["run"], "required: config;"),
    "demo, a key": (["demo", "train.learning_rat=1"], "did you mean 'learning_rate'?"),
    "sample, a penalty": (["sample", *TRAIN[1:], "--length_penalty", "nan"], "--length_penalty nan: must be a finite"),
    "reproduce, no file": (["reproduce", "imdb", "--check", "no.json", "--output", "o"], "no.json: no such file"),
    "convert, pairs of none": (["convert", "d", "--output", "o.jsonl", "--pairing", "all"], "give --to as well"),
    "convert, rows of no responses": (
        ["convert", "d", "--output", "o.jsonl", "--queries_only", "--to", "trl-best"],
        "--queries_only: leaves no responses",
    ),
    "arena, raters": (
        ["arena", "create", "s", "--data", "A=d.jsonl", "--data", "B=d.jsonl", "--raters", "-3"],
        "-3: from 1",
    ),
    "arena, a blank file": (["arena", "results", "blank"], "blank: holds no study"),
    "run, nowhere": (["run", "hh-dp", "--output", ""], "--output is empty"),
    "an estimate of no model": (
        ["run", "hh-dp", "--dry_run", "model=no/model", *REWARDS],
        "--model no/model: cannot be",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused_before_any_work(case: str, refused: Callable[..., str]) -> None:
    Path("folder").mkdir()
    Path("blank").touch()
    command, words = NONSENSE[case]
    assert words in refused(*command)
    assert sorted(path.name for path in Path().iterdir()) == ["blank", "folder", "tiny_rewards.py"]
    assert not Path("blank").stat().st_size


@pytest.mark.parametrize("command", [TRAIN, REWARD_MODEL, PPO])
def test_a_folder_that_no_training_made_is_not_emptied(command: list[str], refused: Callable[..., str]) -> None:
    tiny.write_rows(Path("d.jsonl"), tiny.rows(3))
    assert "no training wrote that" in refused(*command, "--output", ".", "--overwrite")
    assert {"d.jsonl", "tiny_rewards.py"} <= {path.name for path in Path().iterdir()}


def test_flags_are_not_abbreviated(refused: Callable[..., str], model: Path) -> None:
    assert "unknown flag --num_resp" in refused(*sample(model, "--num_resp", 3))


@pytest.mark.parametrize("command", ["inspect", "convert", "report", "run", "demo"])
def test_an_unknown_flag_of_a_light_command(command: str, refused: Callable[..., str]) -> None:
    needed = {"convert": ["x", "--output", "o"], "report": ["x", "--output", "o"], "run": ["x", "--output", "o"]}
    said = refused(command, *needed.get(command, ["x"] if command == "inspect" else []), "--overwrit")
    assert "--overwrit" in said and f"rrhf {command} --help" in said


def test_a_flag_that_is_missing(refused: Callable[..., str]) -> None:
    assert "--output" in refused("score", "--data", "data.jsonl", "--reward", "provided")
    assert "--output" in refused("convert", "data.jsonl")


def test_values_that_do_not_fit_are_all_named(refused: Callable[..., str], model: Path) -> None:
    tiny.write_rows(Path("data.jsonl"), tiny.rows(2))
    faults = ["--num_responses", 0, "--top_p", 1.5, "--temperature", 0, "--batch_size", 0]
    said = refused(*sample(model, *faults))
    for words in ("--num_responses 0", "--top_p 1.5: must lie in (0, 1]", "--temperature 0", "--batch_size 0"):
        assert words in said
    said = refused(*sample(model, "--policy", "diverse-beam", "--num_beams", 4, "--num_beam_groups", 3))
    assert "--num_beams 4 is not divisible by --num_beam_groups 3" in said
    assert "--max_new_tokens" in refused(*sample(model, "--max_new_tokens", "many"))


def test_an_unknown_policy(refused: Callable[..., str], model: Path) -> None:
    said = refused(*sample(model, "--policy", "divers-beam"))
    assert "--policy divers-beam: did you mean 'diverse-beam'?" in said and "greedy" in said


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("vowels", ["'vowels'", "pkg.module:function"]),
        ("tiny_rewards:vowel", ["tiny_rewards has no 'vowel'", "did you mean 'vowels'?"]),
        ("tiny_reward:vowels", ["no module 'tiny_reward'", "install it"]),
        ("provided:spaces", ["record 'q0'", "no rewards 'spaces'"]),
    ],
)
def test_an_unknown_reward(reward: str, words: list[str], refused: Callable[..., str]) -> None:
    tiny.write_rows(Path("data.jsonl"), tiny.rows(2))
    said = refused("score", "--data", "data.jsonl", "--reward", reward, "--output", "out.jsonl")
    assert all(word in said for word in words)


def test_queries_alone() -> None:
    rows = tiny.rows(3)
    tiny.write_rows(Path("data.jsonl"), rows)
    assert main(["convert", "--queries-only", "data.jsonl", "--output", "queries.jsonl"]) == 0
    assert rows[0]["responses"] and tiny.read_rows(Path("queries.jsonl")) == [
        {name: row[name] for name in ("id", "query", "topic")} for row in rows
    ]


def test_an_unknown_format(refused: Callable[..., str]) -> None:
    tiny.write_rows(Path("data.jsonl"), tiny.rows(2))
    said = refused("convert", "data.jsonl", "--format", "alpacafarn", "--output", "out.jsonl")
    assert "'alpacafarn'" in said and "did you mean 'alpacafarm'?" in said and "preference" in said


def test_unknown_configuration_keys_are_all_named(refused: Callable[..., str], model: Path) -> None:
    settings = tiny.config(model)
    settings["train"]["learning_rat"] = 1
    settings["sample"]["num_response"] = 2
    settings["sampel"] = {}
    tiny.workplace(Path(), settings)
    said = refused("run", "config.yaml", "--output", "run", "evaluate.top_q=1", "train.max_length=long")
    for words in (
        "train.learning_rat: unknown key: did you mean 'learning_rate'?",
        "sample.num_response: unknown key: did you mean 'num_responses'?",
        "sampel: unknown key: did you mean 'sample'?",
        "evaluate.top_q: unknown key: did you mean 'top_",
        "max_length",
    ):
        assert words in said
    assert not Path("run").exists()


def test_a_configuration_that_is_none(refused: Callable[..., str]) -> None:
    said = refused("run", "no.yaml", "--output", "run")
    assert "no.yaml: no such configuration file" in said and "demo" in said
    Path("bad.yaml").write_text("train: [1")
    assert "bad.yaml: not valid YAML" in refused("run", "bad.yaml", "--output", "run")
    Path("list.yaml").write_text("- 1")
    assert "list.yaml" in (said := refused("run", "list.yaml", "--output", "run")) and "evaluate" in said
    Path("good.yaml").write_text("model: m\n")
    assert "section.key=value" in refused("run", "good.yaml", "--output", "run", "train.learning_rate")


def test_an_unknown_reward_of_a_run_is_refused_before_any_work(refused: Callable[..., str], model: Path) -> None:
    tiny.workplace(Path(), tiny.config(model))
    said = refused("run", "config.yaml", "--output", "run", "evaluate.reward=[tiny_rewards:vowel]")
    assert "did you mean 'vowels'?" in said
    assert not Path("run").exists()


def test_data_with_too_few_records(refused: Callable[..., str], model: Path) -> None:
    tiny.workplace(Path(), tiny.config(model), tiny.rows(9))
    assert "too few records" in (said := refused("run", "config.yaml", "--output", "run")) and "held_out_limit" in said


def test_data_of_which_no_limit_can_hold_any_out(refused: Callable[..., str], model: Path) -> None:
    tiny.workplace(Path(), tiny.config(model), tiny.rows(9))
    said = refused("run", "config.yaml", "--output", "run", "data.held_out_limit=0")
    assert "--held_out_limit 0: must be at least 1" in said
    Path("my_data.py").write_text("def none(limit, seed):\n    return []\n")
    for key, wanted in (("held_out", "none can be held out"), ("source", "there is none to train on")):
        given = [] if key == "held_out" else ["data.held_out=data.jsonl"]
        said = refused("run", "config.yaml", "--output", f"run-{key}", *given, f"data.{key}=my_data:none")
        assert f"my_data:none has no records: {wanted}" in said and "held_out_limit" not in said


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_model_folder_without_weights(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    tiny.write_rows(Path("data.jsonl"), tiny.rows(2))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hollow").mkdir(exist_ok=True)
        (tmp_path / "hollow" / name).write_bytes((model / name).read_bytes())
    for command in (sample(tmp_path / "hollow"), train(tmp_path / "hollow")):
        said = refused(*command)
        assert "hollow" in said and "no weights (*.safetensors)" in said and "checkpoint" in said
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(*sample(tmp_path / "empty"))
    assert "missing" in (said := refused(*sample(tmp_path / "missing"))) and "no such folder" in said


def test_weights_that_are_broken(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    import shutil

    tiny.write_rows(Path("data.jsonl"), tiny.rows(2))
    shutil.copytree(model, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    said = refused(*sample(tmp_path / "torn"))
    assert "torn" in said and "cannot be loaded" in said


# --- outputs ---------------------------------------------------------------------------------------------------------


def outputs(model: Path) -> dict[str, list[object]]:
    """Commands whose output is ``out.jsonl``, ``out.html`` or a folder, by output."""
    return {
        "score": score_to(),
        "sample": sample(model),
        "convert": ["convert", "data.jsonl", "--output", "out.jsonl"],
        "inspect": ["inspect", "data.jsonl", "--html", "out.jsonl"],
    }


@pytest.mark.parametrize("command", ["score", "sample", "convert", "inspect"])
def test_an_output_that_exists(command: str, refused: Callable[..., str], model: Path) -> None:
    tiny.write_rows(Path("data.jsonl"), tiny.rows(4))
    Path("out.jsonl").write_text("mine\n")
    arguments = outputs(model)[command]
    assert "out.jsonl exists already: give --overwrite" in refused(*arguments)
    assert Path("out.jsonl").read_text() == "mine\n"
    refused(*arguments, "--overwrite", code=0)
    assert Path("out.jsonl").read_text() != "mine\n"


def test_training_into_a_finished_model(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    tiny.write_rows(Path("data.jsonl"), tiny.rows(4))
    short = list(map(str, train(model, "--max_steps", 1, "--max_length", 64, "--report_to", "none")))
    tiny.warm(*short, cwd=tmp_path).done()
    weights = Path("trained/model.safetensors").read_bytes()
    assert "trained holds a finished model: give --overwrite" in refused(*short)
    assert Path("trained/model.safetensors").read_bytes() == weights
    tiny.warm(*short, "--overwrite", "--learning_rate", "0.1", "--warmup_steps", "0", cwd=tmp_path).done()
    assert Path("trained/model.safetensors").read_bytes() != weights


def test_a_reward_that_fails_leaves_what_stood_there(refused: Callable[..., str]) -> None:
    tiny.write_rows(Path("data.jsonl"), tiny.rows(4))
    Path("out.jsonl").write_text("mine\n")
    Path("bad_rewards.py").write_text(
        "def nan(prompts, completions):\n    return [float('nan')] * len(prompts)\n"
        "def short(prompts, completions):\n    return [1.0]\n"
        "def fails(prompts, completions):\n    return [1 / 0]\n"
    )
    for name, words in (("nan", "gave nan"), ("short", "1 scores for the 2"), ("fails", "division by zero")):
        command = ["score", "--data", "data.jsonl", "--reward", f"bad_rewards:{name}", "--output", "out.jsonl"]
        said = refused(*command, "--overwrite")
        assert f"bad_rewards:{name}" in said and words in said and "q0" in said
        assert Path("out.jsonl").read_text() == "mine\n"


def limited() -> None:
    """Files may not grow past 2 KiB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))


def test_folders_that_cannot_be_made_on_a_read_only_disk(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.mkdir

    def read_only(path: Any, *arguments: Any, **options: Any) -> None:
        if Path(path).is_relative_to("disk") and Path(path) != Path("disk"):
            if not Path(path).parent.exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *arguments, **options)

    tiny.write_rows(Path("data.jsonl"), tiny.rows(4))
    Path("disk").mkdir()
    monkeypatch.setattr(os, "mkdir", read_only)
    said = refused("convert", "data.jsonl", "--output", "disk/a/b/out.jsonl")
    assert "disk/a/b/out.jsonl: cannot write: Read-only file system" in said and "--output" in said
    said = refused("reproduce", "imdb", "--scale", "micro", "--output", "disk/a/b")
    assert "disk/a: Read-only file system: name another" in said


def test_a_full_disk_while_scoring(tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "data.jsonl", tiny.rows(60))
    (tmp_path / "out.jsonl").write_text("good\n")
    result = tiny.cold(*score_to(), "--overwrite", cwd=tmp_path, preexec_fn=limited)
    assert result.code == 2, result.err
    assert (
        "out.jsonl" in result.err and "cannot write: File too large" in result.err and "free some space" in result.err
    )
    assert "Traceback" not in result.err
    assert (tmp_path / "out.jsonl").read_text() == "good\n"
    tiny.cold(*score_to(), "--overwrite", cwd=tmp_path).done()
    assert len(tiny.read_rows(tmp_path / "out.jsonl")) == 60


def test_a_full_disk_while_training(model: Path, tmp_path: Path) -> None:
    """The weights do not fit; the checkpoints of before stay and the same command goes on from them."""
    tiny.write_rows(tmp_path / "data.jsonl", tiny.rows(8))
    flags = [
        "--max_steps=4",
        "--save_steps=2",
        "--max_length=64",
        "--report_to=none",
        "--gradient_accumulation_steps=1",
    ]
    command = [str(part) for part in train(model, *flags)]
    limit = (model / "model.safetensors").stat().st_size // 2
    result = tiny.warm(
        *command, cwd=tmp_path, faults=[tiny.fill("rrhf.training.trainer:RRHFTrainer._save_checkpoint", 2, limit)]
    )
    assert result.code == 2, result.err
    assert "trained" in result.err and "free some space" in result.err and "Traceback" not in result.err
    calls = tmp_path / "calls"
    tiny.warm(
        *command, cwd=tmp_path, faults=[tiny.count("rrhf.training.trainer:RRHFTrainer.training_step", calls)]
    ).done()
    assert len(calls.read_text().split()) == 2
    assert (tmp_path / "trained/model.safetensors").exists()


# --- light commands --------------------------------------------------------------------------------------------------


HEAVY = {"torch", "transformers", "datasets", "pandas", "sklearn", "matplotlib", "pyarrow"}


def imported(*arguments: str, cwd: Path) -> tuple[str, set[str]]:
    """What a command prints, and which of the heavy libraries it imported."""
    script = (
        "import sys; from rrhf.cli.main import main; code = main(sys.argv[1:]);"
        f"print('imported:', *({HEAVY!r} & sys.modules.keys())); sys.exit(code)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=cwd, capture_output=True, text=True, check=True
    )
    said, _, names = found.stdout.rpartition("imported:")
    return said, set(names.split())


def test_the_overview(tmp_path: Path) -> None:
    said, heavy = imported("--help", cwd=tmp_path)
    assert not heavy
    assert all(f"rrhf {name}" in said for name in COMMANDS)
    assert imported(cwd=tmp_path)[0] == said
    assert imported("--version", cwd=tmp_path) == (f"{__version__}\n", set())


def test_inspect_imports_no_model_library(tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "data.jsonl", tiny.rows(4))
    said, heavy = imported("inspect", "data.jsonl", cwd=tmp_path)
    assert not heavy & {"torch", "transformers", "datasets"}
    assert "4" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: rrhf {command}" in capsys.readouterr().out


def test_flags_take_hyphens_too(refused: Callable[..., str], model: Path) -> None:
    tiny.write_rows(Path("data.jsonl"), tiny.rows(3, responses=0))
    refused(*sample(model, "--num-responses", 2, "--batch-size", 2), code=0)
    assert [len(row["responses"]) for row in tiny.read_rows(Path("out.jsonl"))] == [2, 2, 2]


def test_a_training_says_what_its_loss_takes_and_what_it_does_not_read(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(4))
    planned = tiny.warm(
        "train", "--model", "model", "--data", "scored.jsonl", "--output", "out", "--device", "cpu", "--dry_run",
        "--ranking_loss", "simpo", "--dpo_beta", "0.5", cwd=tmp_path,
    ).done()  # fmt: skip
    assert "simpo as in its paper: " in planned.err and "--margin 1.0" in planned.err
    assert "--dpo_beta 0.5: the ranking loss simpo does not read it" in planned.err
