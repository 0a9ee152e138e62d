"""The benchmarks run, in their smallest form: a model of two layers, two records. RRHF_LONG=1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.tiny import environment

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"
SMALL = ["--device", "cpu", "--queries", "2"]

pytestmark = [
    pytest.mark.skipif(os.environ.get("RRHF_LONG") != "1", reason="takes minutes: RRHF_LONG=1"),
    pytest.mark.skipif(not FOLDER.exists(), reason="no benchmarks beside these tests"),
]


def run(script: str, *arguments: str, code: int | None = 0, small: Sequence[str] = SMALL) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *small, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert code in (None, done.returncode), done.stderr[-3000:]
    return done.stdout


def test_training() -> None:
    printed = run("training.py", "--model", "random:tiny", "--rounds", "1", "--precision", "bf16 weights")
    assert "| tree, 1024 tokens a forward     | bf16 weights |" in printed
    assert "1024 tokens a forward: " in printed  # the ratio


def test_sampling() -> None:
    sizes = ["--new_tokens", "4", "--batches", "2", "--other_batches", "2", "--dtypes", "float32"]
    printed = run("sampling.py", "--model", "random:tiny", "--policies", "top-p", *sizes)
    assert "| top-p  | float32 |" in printed


def test_scoring() -> None:
    printed = run("scoring.py", "--responses", "3")
    assert "| rrhf score  | 2       |" in printed and "| a bare loop | 1       |" in printed


def test_rewards() -> None:
    printed = run("rewards.py", "--backbone", "minilm", "--dtypes", "float32")
    assert "| minilm | float32 |" in printed and "×" in printed


def test_arena() -> None:
    printed = run(
        "arena.py", "--raters", "3", "--votes", "4", "--pause", "0.5", small=[], code=None
    )  # it fails where it is slow
    assert "| a vote        | 12    |" in printed and "0 votes lost, 0 counted twice" in printed


def test_gpu(tmp_path: Path) -> None:
    """A model that cannot be loaded fails its rows and no other's; a row that has no GPU says so."""
    file = tmp_path / "gpu.jsonl"
    rows = ["train: tree", "equal: tree by masked", "sample: top-p, rrhf"]
    sizes = ["--new_tokens", "4", "--batches", "2", "--budget", "1024", "--output", str(file)]
    run("gpu.py", "--models", "random:none", "random:tiny", "--rows", *rows, *sizes, code=1)
    results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    states = {(result["model"], result["row"]): result["status"] for result in results}
    assert states.pop(("random:none", "train: tree by FlexAttention")) == "skipped"
    assert {state for (model, _), state in states.items() if model == "random:none"} == {"failed"}
    assert states["random:tiny", "train: tree by FlexAttention"] == "skipped"
    masked, equal, sampled = (r for r in results if r["model"] == "random:tiny" and r["status"] == "done")
    assert masked["queries_per_second"] > 0 and 0 < masked["share_of_torch"] < 1
    assert equal["equal"] and equal["p_apart"] <= equal["p_bound"]
    assert sampled["tokens_per_second"] > 0
