"""OP-k in two processes: windows of the same samples as in one. RRHF_LONG=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import tiny

pytestmark = pytest.mark.skipif(os.environ.get("RRHF_LONG") != "1", reason="takes minutes: RRHF_LONG=1")

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
FLAGS = (
    "--model", "model", "--device", "cpu", "--dtype", "float32", "--bf16", "false", "--use_cpu", "true", "--data",
    "queries.jsonl", "--resample_steps", "2", "--reward", "tiny_rewards:vowels", "--policy", "top-p", "--num_responses",
    "2", "--max_new_tokens", "5", "--batch_size", "1", "--num_train_epochs", "1", "--max_length", "64",
    "--save_strategy", "no", "--gradient_accumulation_steps", "1",
)  # fmt: skip


def test_processes_share_a_window_out(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    tiny.write_rewards(tmp_path)
    tiny.write_rows(tmp_path / "queries.jsonl", tiny.rows(10, scores=False))
    for output, launcher, queries in (("one", ("-m", "rrhf.cli"), "4"), ("two", (*TORCHRUN, "-m", "rrhf.cli"), "2")):
        done = subprocess.run(
            [sys.executable, *launcher, "train", *FLAGS, "--output", output, "--per_device_train_batch_size", queries],
            cwd=tmp_path, env=tiny.environment(), capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    for number in (0, 1):
        one, two = (tmp_path / output / f"windows/{number}.jsonl" for output in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), number
    assert (tmp_path / "two/training.json").exists()


def test_a_signal_while_a_window_is_sampled_keeps_the_steps_before_it(tmp_path: Path) -> None:
    """All processes stop after one checkpoint, and go on to the weights of an undisturbed training."""
    tiny.write_model(tmp_path / "model")
    tiny.write_rewards(tmp_path)
    tiny.write_rows(tmp_path / "queries.jsonl", tiny.rows(10, scores=False))
    hit = [tiny.die("rrhf.training.online:OnlineRecords._enter", 2, "TERM")]
    for output, faults in (("whole", []), ("stopped", hit), ("stopped", [])):
        flags = (*FLAGS, "--output", output, "--per_device_train_batch_size", "2", "--ddp_timeout", "120")
        done = tiny.cold("train", *flags, cwd=tmp_path, launcher=TORCHRUN, faults=faults)
        assert (done.code == 0) == (not faults), done.err[-3000:]
        if faults:
            assert "exitcode  : 143" in done.err
            assert [path.name for path in (tmp_path / output).glob("checkpoint-*")] == ["checkpoint-2"]
    one, two = (tmp_path / output / "model.safetensors" for output in ("whole", "stopped"))
    assert one.read_bytes() == two.read_bytes()
