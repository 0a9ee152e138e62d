"""rrhf baseline sft: RRHF's trainer on one response a query."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from support import tiny
from support.tiny import die

STEP = "rrhf.training.trainer:RRHFTrainer.training_step"


def flags(model: Path, output: str) -> tuple[str, ...]:
    return (
        "--model", str(model), "--device", "cpu", "--dtype", "float32", "--bf16", "false", "--data", "data.jsonl",
        "--output", output, "--num_train_epochs", "1", "--gradient_accumulation_steps", "4", "--learning_rate", "1e-3",
        "--save_steps", "1",
    )  # fmt: skip


def test_the_chosen_responses_are_fitted_killed_or_not(model: Path, tmp_path: Path) -> None:
    """Without any score; and it is what RRHF's trainer does with that response as the best."""
    rows = tiny.rows(9, scores=False)
    for row in rows[:8]:
        row["sources"] = ["human/chosen", "human/rejected|top-p/0"]
    tiny.write_rows(tmp_path / "data.jsonl", rows)
    command = ("baseline", "sft", *flags(model, "fitted"), "--fit", "human/chosen")
    assert tiny.warm(*command, cwd=tmp_path, faults=[die(STEP, 6)]).code == -signal.SIGKILL
    said = tiny.warm(*command, cwd=tmp_path).done().err
    assert "8 queries with a response of human/chosen" in said and "1 without a response of human/chosen" in said
    assert json.loads((tmp_path / "fitted/training.json").read_text())["settings"]["ranking_loss"] == "none"

    tiny.write_rows(tmp_path / "data.jsonl", [{**row, "scores": [1.0, 0.5]} for row in rows[:8]])
    tiny.warm("train", *flags(model, "trained"), "--ranking_loss", "none", cwd=tmp_path).done()
    tiny.warm("baseline", "sft", *flags(model, "best"), cwd=tmp_path).done()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fitted", "trained", "best")]
    assert weights[0] == weights[1] == weights[2]


def test_the_fitted_responses_stand_beside_the_folder_however_it_is_written(model: Path, tmp_path: Path) -> None:
    """With a slash they stood in it, where --overwrite removed them, and the model, before they were read."""
    tiny.write_rows(tmp_path / "data.jsonl", tiny.rows(4, scores=False))
    command = ("baseline", "sft", *flags(model, "fitted/"), "--fit", "human/0", "--max_steps", "1", "--overwrite")
    for _ in range(2):
        tiny.warm(*command, cwd=tmp_path).done()
        assert (tmp_path / "fitted-data.jsonl").exists() and (tmp_path / "fitted/model.safetensors").exists()
        assert not list((tmp_path / "fitted").glob("*.jsonl"))


def test_what_cannot_be_fitted_is_refused(model: Path, tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "data.jsonl", tiny.rows(3))
    for more, message in (
        (["--fit", "human/chosen"], "no response has the source human/chosen: name one of human/0, human/1"),
        (["--ranking_loss", "hinge"], "fine-tuning alone has none"),
        (["--sft_weight", "0"], "nothing would be learnt"),
        (["--resample_steps", "2"], "--resample_steps is for responses that are sampled while training, and fine-t"),
        (["--kl-target=3"], "--kl_target is for responses that are sampled while training, and fine-t"),
    ):
        result = tiny.warm("baseline", "sft", *flags(model, "out"), *more, cwd=tmp_path)
        assert result.code == 2 and message in result.err and "Traceback" not in result.err, result.err
    page = tiny.warm("baseline", "sft", "--help", cwd=tmp_path).done().out
    assert "--sft_weight " in page and "--resample_steps" not in page and "--kl_target" not in page
