"""The gold reward of the micro scale: fine-tuned, stopped and resumed on a tiny encoder, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rrhf.recipes.demo.data import Review
from rrhf.recipes.micro.gold import DONE, TOKENS, GoldClassifier, GoldSettings, train_gold
from support.reward_models import write_encoder
from support.stopping import stopped_at, went_on_at

SETTINGS = GoldSettings(pieces=2, epochs=6.0, rows=8, learning_rate=3e-3, save_steps=4)
GOOD, BAD = "the river was high and the bridge stood", "a letter in the drawer of the kitchen"
REVIEWS = [Review(f"{(GOOD, BAD)[number % 2]} {number}", 1 - number % 2) for number in range(32)]


def test_it_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder", {0: "negative", 1: "positive"}, context=TOKENS)
    found = train_gold(tmp_path / "encoder", REVIEWS, REVIEWS, tmp_path / "whole", SETTINGS)
    assert found["accuracy on held-out pieces"] == 1.0
    assert json.loads((tmp_path / "whole" / DONE).read_text()) == found
    assert not (tmp_path / "whole" / "training").exists()

    stopped_at(6, lambda: train_gold(tmp_path / "encoder", REVIEWS, REVIEWS, tmp_path / "stopped", SETTINGS))
    assert not (tmp_path / "stopped" / DONE).exists()
    went_on_at(5, lambda: train_gold(tmp_path / "encoder", REVIEWS, REVIEWS, tmp_path / "stopped", SETTINGS))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]

    gold = GoldClassifier.load(tmp_path / "whole")
    texts = [review.text for review in REVIEWS] + ["a bridge", "", "the " * 200]
    together = gold.probabilities(texts)
    assert together[0] > 0.5 > together[1]
    assert together == pytest.approx([gold.probabilities([text])[0] for text in texts], abs=1e-5)
