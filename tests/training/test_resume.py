"""``rrhf train`` killed with SIGKILL between the forward passes of one optimiser step: it ends as if undisturbed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from support import tiny
from support.models import tiny_model, tiny_tokenizer
from support.tiny import count, die

BACKWARD = "accelerate.accelerator:Accelerator.backward"
UPDATE = "accelerate.optimizer:AcceleratedOptimizer.step"

# name → flags; every one computes a step of 4 queries in several passes
CASES: dict[str, list[str]] = {
    "one query a forward": ["--max_tokens_per_forward", "80"],
    "slices of a query": ["--max_tokens_per_forward", "30"],
    "dropout": ["--max_tokens_per_forward", "30"],
    "a reference, slices and the step's KL": ["--max_tokens_per_forward", "30", "--ranking_loss", "kto"],
    "lora with dropout": ["--max_tokens_per_forward", "80", "--peft", "lora", "--lora_dropout", "0.2"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("resume")
    tokenizer = tiny_tokenizer()
    dropping = tiny_model("gpt2", len(tokenizer))
    assert dropping.config.resid_pdrop == dropping.config.embd_pdrop == 0.1
    dropping.save_pretrained(folder / "dropping")
    tokenizer.save_pretrained(folder / "dropping")
    return {"plain": tiny.write_model(folder / "plain"), "dropping": folder / "dropping"}


@pytest.mark.parametrize("case", CASES)
def test_killed_in_the_middle_of_an_accumulation(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(14, responses=4))
    model = models["dropping" if case == "dropout" else "plain"]

    def train(output: str, faults: Any = ()) -> tiny.Result:
        # 4 steps an epoch, the last of 2 queries; checkpoints after steps 2, 4, 6 …
        return tiny.warm(
            "train", "--model", str(model), "--data", "scored.jsonl", "--output", output, "--device", "cpu",
            "--dtype", "float32", "--bf16", "false", "--per_device_train_batch_size", "1",
            "--gradient_accumulation_steps", "4", "--num_train_epochs", "2", "--learning_rate", "0.01",
            "--save_steps", "2", "--logging_steps", "1", "--report_to", "none", "--seed", "5", *CASES[case],
            cwd=tmp_path, faults=faults,
        )  # fmt: skip

    calls = tmp_path / "calls"
    train("whole", [count(BACKWARD, calls), count(UPDATE, calls)]).done()
    steps = calls.read_text().split(UPDATE)[:-1]
    passes = [step.count(BACKWARD) for step in steps]
    assert len(passes) == 8 and min(passes[:3]) >= 3, passes

    # In step 6, which lies in the second epoch: its last gradient is not there yet, the others are.
    killed = train("killed", [die(BACKWARD, sum(passes[:6]))])
    assert killed.code == -signal.SIGKILL, killed.err[-2000:]
    folder = tmp_path / "killed"
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (folder / "model.safetensors").exists()
    calls.unlink()
    resumed = train("killed", [count(BACKWARD, calls), count(UPDATE, calls)]).done()
    assert "going on from" in resumed.err and "checkpoint-4" in resumed.err
    assert [step.count(BACKWARD) for step in calls.read_text().split(UPDATE)[:-1]] == passes[4:]

    def weights(output: str) -> bytes:
        return (tmp_path / output / "model.safetensors").read_bytes()

    def curve(output: str) -> list[dict[str, float]]:
        log = json.loads((tmp_path / output / "trainer_state.json").read_text())["log_history"]
        return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in log if "rank_loss" in line]

    assert weights("killed") == weights("whole")
    assert weights("whole") != (model / "model.safetensors").read_bytes()
    assert curve("killed") == curve("whole")


def test_a_signal_in_the_last_step_leaves_a_whole_model_and_ends_the_command(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """So that a run does not go on to its evaluation; in a step before it the training stops there."""
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(6))
    train = ("train", "--model", str(models["plain"]), "--data", "scored.jsonl", "--device", "cpu", "--max_steps", "3",
             "--gradient_accumulation_steps", "2", "--report_to", "none")  # fmt: skip
    last = tiny.warm(*train, "--output", "last", cwd=tmp_path, faults=[die(UPDATE, 3, "TERM")])
    assert last.code == 143 and (tmp_path / "last" / "training.json").exists(), last.err[-2000:]
    assert (tmp_path / "last" / "model.safetensors").exists()
    before = tiny.warm(*train, "--output", "before", cwd=tmp_path, faults=[die(UPDATE, 2, "INT")])
    assert before.code == 130 and not (tmp_path / "before" / "training.json").exists()
    assert (tmp_path / "before" / "checkpoint-2").exists()
    tiny.warm(*train, "--output", "before", cwd=tmp_path).done()


def test_the_command_that_was_stopped_goes_on_given_as_it_was(models: dict[str, Path], tmp_path: Path) -> None:
    """With --overwrite too, and what it says of the training is what an undisturbed one says."""
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(6))
    train = ("train", "--model", str(models["plain"]), "--data", "scored.jsonl", "--device", "cpu", "--max_steps", "12",
             "--dtype", "float32", "--bf16", "false", "--gradient_accumulation_steps", "2", "--learning_rate", "0.01",
             "--report_to", "none")  # fmt: skip
    tiny.warm(*train, "--output", "whole", cwd=tmp_path).done()
    again = (*train, "--output", "out", "--overwrite")
    assert tiny.warm(*again, cwd=tmp_path, faults=[die(UPDATE, 7, "TERM")]).code == 143

    place = tmp_path / "out/training-settings.json"
    settings = json.loads(place.read_text(encoding="utf-8"))
    assert settings.pop("processes") == 1  # with others a step has other queries
    place.write_text(json.dumps({**settings, "processes": 4}), encoding="utf-8")
    refused = tiny.warm(*train, "--output", "out", cwd=tmp_path)
    assert refused.code == 2 and "(processes was 4, is 1)" in refused.err
    place.write_text(json.dumps(settings), encoding="utf-8")  # as older versions wrote them

    resumed = tiny.warm(*again, cwd=tmp_path).done()
    assert "going on from" in resumed.err and "checkpoint-7" in resumed.err
    whole, out = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "out"))
    assert out["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)  # sums of fp32
    assert "going on from" not in tiny.warm(*again, cwd=tmp_path).done().err  # a finished one is made anew


def test_going_on_with_other_settings_says_which(models: dict[str, Path], tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(6))
    tiny.write_rows(tmp_path / "other.jsonl", tiny.rows(6))
    train = ("train", "--model", str(models["plain"]), "--data", "scored.jsonl", "--output", "out", "--device", "cpu",
             "--dtype", "float32", "--bf16", "false", "--gradient_accumulation_steps", "2", "--save_steps", "1",
             "--report_to", "none", "--peft", "lora")  # fmt: skip
    assert tiny.warm(*train, cwd=tmp_path, faults=[die(UPDATE, 3)]).code == -signal.SIGKILL
    others = ("--learning_rate", "0.5", "--lora_r", "4", "--ranking_loss", "margin", "--data", "other.jsonl")
    refused = tiny.warm(*train, *others, cwd=tmp_path)
    assert refused.code == 2 and "Traceback" not in refused.err
    for said in (
        "learning_rate was 0.0002, is 0.5", "lora_r was 16, is 4", "ranking_loss was 'hinge', is 'margin'",
        "--overwrite",
    ):  # fmt: skip
        assert said in refused.err
    assert "other.jsonl" not in refused.err  # it holds the same
    assert "seed was" not in refused.err
    ours = tiny.warm(*train, "--resume_from_checkpoint", "true", cwd=tmp_path)
    assert ours.code == 2 and "--resume_from_checkpoint: leave it out" in ours.err
    # What changes no result may differ, and where files lie.
    on = tiny.warm(*train, "--logging_steps", "1", "--data", str(tmp_path / "other.jsonl"), cwd=tmp_path).done()
    assert "checkpoint-2" in on.err


def test_what_ended_before_its_first_step_is_no_hindrance(models: dict[str, Path], tmp_path: Path) -> None:
    """The command goes on once its data is mended; after a step other data is named."""
    train = ("train", "--model", str(models["plain"]), "--data", "scored.jsonl", "--output", "out", "--device", "cpu",
             "--dtype", "float32", "--bf16", "false", "--gradient_accumulation_steps", "2", "--save_steps", "1",
             "--report_to", "none")  # fmt: skip
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(6, scores=False))
    assert tiny.warm(*train, cwd=tmp_path).code == 2
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(6))
    assert tiny.warm(*train, cwd=tmp_path, faults=[die(UPDATE, 3)]).code == -signal.SIGKILL
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(7))
    refused = tiny.warm(*train, cwd=tmp_path)
    assert refused.code == 2 and "data_checksum was " in refused.err and ", of scored.jsonl" in refused.err


def test_held_out_records_are_measured_while_training(models: dict[str, Path], tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(6))
    train = ("train", "--model", str(models["plain"]), "--data", "scored.jsonl", "--eval_data", "scored.jsonl",
             "--output", "out", "--device", "cpu", "--eval_steps", "1", "--max_steps", "2",
             "--report_to", "none")  # fmt: skip
    tiny.warm(*train, cwd=tmp_path).done()
    history = json.loads((tmp_path / "out/trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [row["step"] for row in history if "eval_rank_accuracy" in row] == [1, 2]


def test_other_contents_under_the_same_names_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(6))
    tiny.write_rows(tmp_path / "held.jsonl", tiny.rows(2))
    shutil.copytree(models["plain"], tmp_path / "model")
    train = ("train", "--model", "model", "--data", "scored.jsonl", "--eval_data", "held.jsonl", "--output", "out",
             "--device", "cpu", "--dtype", "float32", "--bf16", "false", "--gradient_accumulation_steps", "2",
             "--save_steps", "1", "--report_to", "none")  # fmt: skip
    assert tiny.warm(*train, cwd=tmp_path, faults=[die(UPDATE, 3)]).code == -signal.SIGKILL
    inputs = {"scored.jsonl": "data_checksum", "held.jsonl": "eval_data_checksum", "model/config.json": "model_digest"}
    for file, name in inputs.items():
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text(before + "\n")
        refused = tiny.warm(*train, cwd=tmp_path)
        assert refused.code == 2 and f"{name} was '" in refused.err
        assert refused.err.count(" was '") == 1
        (tmp_path / file).write_text(before)
    settings = json.loads((tmp_path / "out" / "training-settings.json").read_text())
    old = {name: value for name, value in settings.items() if name not in inputs.values()}
    assert old.pop("max_tokens_per_forward") == 2048  # what was chosen here; elsewhere it might have been another
    (tmp_path / "out" / "training-settings.json").write_text(json.dumps({**old, "max_tokens_per_forward": 96}))
    on = tiny.warm(*train, cwd=tmp_path).done()  # without the digests, as older versions wrote it
    assert "checkpoint-2" in on.err and "96 tokens a forward" in on.err


def test_records_without_a_signal_are_counted(models: dict[str, Path], tmp_path: Path) -> None:
    lines = tiny.rows(5, responses=3)
    lines[0]["scores"] = [None, None, None]
    lines[1]["scores"] = [0.5, None, None]
    lines[2]["query"] = "a very long query that leaves no room " * 8
    tiny.write_rows(tmp_path / "scored.jsonl", lines)
    done = tiny.warm(
        "train", "--model", str(models["plain"]), "--data", "scored.jsonl", "--output", "out", "--device", "cpu",
        "--bf16", "false", "--max_steps", "1", "--max_length", "48", "--report_to", "none", cwd=tmp_path,
    ).done()  # fmt: skip
    assert "3 records to train on" in done.err and "1 skipped: no response is scored" in done.err
    assert "1 skipped: the query leaves no room" in done.err and "--max_query_length" in done.err
    assert "1 with fewer than two scored responses (fitted, not ranked)" in done.err
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert summary["records"] == 3 and summary["unranked"] == 1 and sum(summary["skipped"].values()) == 2
