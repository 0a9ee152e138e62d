"""Weights saved between those that training began with and those it came to."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rrhf.common.errors import UserError
from rrhf.models.interpolation import interpolated
from rrhf.training.trainer import RRHFTrainer
from support import tiny
from support.models import tiny_model, tiny_tokenizer, toy_records
from support.training import config


def test_the_straight_line() -> None:
    start = {"a": torch.tensor([1.0, 2.0]), "n": torch.tensor([1]), "half": torch.tensor([1.0]).bfloat16()}
    end = {"a": torch.tensor([3.0, -2.0]), "n": torch.tensor([9]), "half": torch.tensor([2.0]).bfloat16(),
           "new": torch.tensor([5.0])}  # fmt: skip
    found = interpolated(start, end, 0.25)
    assert found["a"].tolist() == [1.5, 1.0] and found["n"].tolist() == [9] and found["new"].tolist() == [5.0]
    assert found["half"].dtype == torch.bfloat16 and found["half"].item() == 1.25
    assert all(torch.equal(interpolated(start, end, 1.0)[name], weight) for name, weight in end.items())
    assert torch.equal(interpolated(start, end, 0.0)["a"], start["a"])


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_what_is_saved_lies_there_and_checkpoints_do_not(peft: str, tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(8))
    saved = {}
    for share in (1.0, 0.4):
        out = f"out-{share}"
        tiny.warm(
            "train", "--model", str(model), "--data", "scored.jsonl", "--output", out, "--device", "cpu", "--dtype",
            "float32", "--bf16", "false", "--max_steps", "4", "--learning_rate", "0.01", "--save_steps", "4",
            "--save_total_limit", "1", "--report_to", "none", "--seed", "5", "--interpolation", str(share),
            *([] if peft == "none" else ["--peft", peft]), cwd=tmp_path,
        ).done()  # fmt: skip
        saved[share] = load_file(tmp_path / out / "model.safetensors")
    start, moved = load_file(model / "model.safetensors"), 0.0
    for name, trained in saved[1.0].items():
        wanted = start[name] + 0.4 * (trained - start[name])
        assert torch.allclose(saved[0.4][name], wanted, atol=1e-6), name
        moved = max(moved, float((trained - start[name]).abs().max()))
    assert moved > 1e-3 and math.isfinite(moved)
    if peft == "none":
        checkpoint = load_file(tmp_path / "out-0.4" / "checkpoint-4" / "model.safetensors")
        assert all(torch.equal(checkpoint[name], trained) for name, trained in saved[1.0].items())


def test_an_adapter_that_is_not_merged_is_refused(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(4))
    refused = tiny.warm("train", "--model", str(model), "--data", "scored.jsonl", "--output", "out", "--device", "cpu",
                        "--peft", "lora", "--merge_adapter", "false", "--interpolation", "0.5", "--report_to", "none",
                        cwd=tmp_path)  # fmt: skip
    assert refused.code == 2 and "give --merge_adapter true" in refused.err


def test_a_trainer_of_ones_own_is_told_what_it_lacks(tmp_path: Path) -> None:
    model = tiny_model("llama", len(tiny_tokenizer()))
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = config(tmp_path, max_steps=1, learning_rate=0.1, interpolation=0.5)
    trainer = RRHFTrainer(model=model, args=args, train_dataset=toy_records(4), processing_class=tiny_tokenizer())
    trainer.train()
    with pytest.raises(UserError, match="save_between"):
        trainer.save_model(str(tmp_path / "saved"))
    trainer.save_between(start)
    trainer.save_model(str(tmp_path / "saved"))
    found = load_file(tmp_path / "saved" / "model.safetensors")
    for name, weight in found.items():
        assert torch.allclose(weight, (start[name] + model.state_dict()[name]) / 2, atol=1e-6), name
