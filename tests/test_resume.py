"""``rrhf train`` killed with SIGKILL between the forward passes of one optimiser step: it ends as if undisturbed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import tiny
from conftest import tiny_model, tiny_tokenizer
from tiny import count, die

BACKWARD = "accelerate.accelerator:Accelerator.backward"
UPDATE = "accelerate.optimizer:AcceleratedOptimizer.step"

# name → flags; every one computes a step of 4 queries in several passes
CASES: dict[str, list[str]] = {
    "one query a forward": ["--max_tokens_per_forward", "80"],
    "slices of a query": ["--max_tokens_per_forward", "30"],
    "dropout": ["--max_tokens_per_forward", "30"],
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
