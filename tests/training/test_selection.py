"""Which responses train: by hand, and in the path from a file of records to what the trainer computes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from rrhf.common.errors import UserError
from rrhf.models.tokenization import TextFormat
from rrhf.records.record import Record
from rrhf.training.config import RRHFConfig
from rrhf.training.dataset import EncodedRecords
from rrhf.training.selection import SELECTIONS, SelectionSettings, describe_selection, selected
from rrhf.training.trainer import RRHFTrainer
from support.models import tiny_model, tiny_tokenizer


def record(*scores: float | None) -> Record:
    letters = "abcdefghijkl"[: len(scores)]
    return Record(
        query="q", id="7", responses=list(letters), sources=[f"s/{letter}" for letter in letters], scores=list(scores),
        rewards={"r": list(scores)},
    )  # fmt: skip


def kept(select: str, *scores: float | None) -> str:
    return "".join(selected(record(*scores), select).responses)


def test_by_hand() -> None:
    assert kept("best-worst", 0.5, 0.9, None, 0.1, 0.7) == "bd"
    assert kept("best-worst", 1.0, 3.0, 1.0, 3.0) == "ab"  # the first of equals
    assert kept("top:2", 0.5, 0.9, None, 0.1, 0.7) == "be"
    assert kept("top:2", 2.0, 1.0, 2.0, 2.0) == "ac"
    assert kept("top:9", 2.0, None, 1.0) == "ac"
    for select in ("best-worst", "best-low"):  # no pair in it: what fits is the best one
        assert kept(select, 2.0, 2.0, 2.0) == "a"
        assert kept(select, None, 2.0) == "b"
        assert kept(select, 0.1 + 0.2, 0.3) == "a"


def test_by_hand_the_low_one() -> None:
    # μ = 5, σ = √((25·2 + 16·2 + 9·2) / 10) = √10, μ − 2σ = −1.3: the worst is nearest
    assert kept("best-low", 0.0, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0, 8.0, 9.0, 10.0) == "aj"
    # μ = 0, σ = √((900 + 225 + 9·19.36 + 29.16) / 12) = 10.5, μ − 2σ = −21: −15 is nearer than −30
    assert kept("best-low", -30.0, -15.0, *[4.4] * 9, 5.4) == "bl"
    # the nearest are as good as the best, or not scored
    assert kept("best-low", *[8.0] * 4, -2.0, None, *[8.0] * 4) == "ae"


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_up_to_five_responses_the_low_one_is_the_worst(k: int) -> None:
    scores = [0.0, *[1.0 + 0.01 * i for i in range(k - 1)]]
    assert kept("best-low", *scores) == kept("best-worst", *scores)


def test_provenance_stays() -> None:
    given = record(0.5, None, 0.9, 0.1)
    chosen = selected(given, "best-worst")
    assert (chosen.id, chosen.sources, chosen.scores) == ("7", ["s/c", "s/d"], [0.9, 0.1])
    assert chosen.rewards == {"r": [0.9, 0.1]}
    assert given == record(0.5, None, 0.9, 0.1)
    assert selected(given, "all") is given
    assert selected(record(None, None), "top:1").responses == ["a", "b"]  # counted as not scored, later


@pytest.mark.parametrize("select", ["best", "top", "top:0", "top:-1", "top:x", "all:2", "best-worst:1"])
def test_a_selection_that_is_none(select: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--select {select}: "):
        RRHFConfig(output_dir=str(tmp_path), select=select)


def test_what_the_trainer_computes_and_what_it_says(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    records = [record(0.5, 0.9, 0.1, 0.7), record(1.0, None, 1.0)]
    args = RRHFConfig(output_dir=str(tmp_path), select="best-worst", bf16=False, use_cpu=True, report_to="none")
    trainer = RRHFTrainer(
        tiny_model("llama", len(tokenizer)), args, records, eval_dataset=records, processing_class=tokenizer
    )
    first, second = trainer.train_dataset.records
    assert (list(first.scores), list(second.scores)) == ([0.9, 0.1], [1.0])
    assert "3 responses left out by --select" in trainer.train_dataset.summary()
    assert [len(held_out.responses) for held_out in trainer.eval_dataset.records] == [4, 2]
    every = EncodedRecords(records, TextFormat(tokenizer), 192)
    assert "--select" not in every.summary() and every.left_out == 0


def test_the_help_describes_every_selection() -> None:
    (setting,) = fields(SelectionSettings)
    for name, selection in SELECTIONS.items():
        assert f"{name}: {describe_selection(selection)}" in setting.metadata["help"]
