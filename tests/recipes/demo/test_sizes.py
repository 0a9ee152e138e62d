"""The demo's size is chosen once, by what the machine does in a few seconds; a run that was begun keeps its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rrhf.cli import demo
from rrhf.recipes.config import parse_config, read_config
from rrhf.recipes.demo import sizes
from rrhf.recipes.demo.sizes import PATIENCE, SIZES, choose_size, minutes
from rrhf.recipes.speed import Speed


def test_the_largest_size_that_a_person_waits_for() -> None:
    assert choose_size({"quick": 1.0, "small": 4.0, "full": PATIENCE}) == "full"
    assert choose_size({"quick": 1.0, "small": 4.0, "full": PATIENCE + 0.1}) == "small"
    # Slower still: the quick one would end in time, but its figures mean nothing.
    assert choose_size({"quick": 1.0, "small": 11.0, "full": 30.0}) == "small"


def test_every_size_is_a_whole_configuration(tmp_path: Path) -> None:
    whole = read_config(SIZES["full"])
    for name in SIZES.values():
        config = read_config(name)
        assert parse_config(config, tmp_path).data.source == "rrhf.recipes.demo.data:training_prompts"
        # What is measured stays: the same model, rewards, texts and sampling.
        assert config["sample"] == whole["sample"] and config["evaluate"] == whole["evaluate"]
        assert (config["model"], config["score"]) == (whole["model"], whole["score"])


def test_minutes_follow_the_configuration() -> None:
    slow = Speed(sampled=0.8, trained=1.8, optimised=0.5)
    estimates = [minutes(read_config(name), slow) for name in SIZES.values()]
    assert estimates == sorted(estimates)
    config: dict[str, Any] = {
        "data": {"limit": 60, "held_out_limit": 0},
        "train": {"num_train_epochs": 2, "per_device_train_batch_size": 8},
    }
    seconds = sizes.FIXED_SECONDS + 60 * 0.8 + 120 * 1.8 + 16 * 0.5
    assert minutes(config, slow) == pytest.approx(seconds / 60)


def test_what_was_chosen_stands_and_is_not_chosen_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[dict[str, float]] = [{"quick": 1.0, "small": 5.0, "full": 20.0}]
    monkeypatch.setattr(sizes, "estimate_sizes", measured.pop)
    given: list[Any] = []
    monkeypatch.setattr(demo, "execute", lambda *arguments: given.append(arguments) or 0)
    assert demo.main(["--output", str(tmp_path)]) == 0
    assert given[-1][0] == SIZES["small"]
    said = capsys.readouterr().err
    assert "small  about  5.0 minutes  ← runs now" in said and "full   about 20.0 minutes  --full" in said
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(read_config(SIZES["small"])))
    assert demo.main(["--output", str(tmp_path)]) == 0  # measuring again would find no more estimates
    assert read_config(given[-1][0]) == read_config(SIZES["small"])
    assert demo.main(["--output", str(tmp_path), "--full"]) == 0
    assert given[-1][0] == SIZES["full"]
