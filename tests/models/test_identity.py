"""The digest of a model: equal for copies, another for other weights, tokenizers and base models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rrhf.models.identity import model_digest


def folder(place: Path, weights: bytes = b"weights", config: str = "config.json", **values: str) -> Path:
    place.mkdir()
    (place / "model.safetensors").write_bytes(weights)
    (place / config).write_text(json.dumps(values))
    return place


def test_copies_are_one_model_and_cards_and_training_state_are_no_part_of_it(tmp_path: Path) -> None:
    model = folder(tmp_path / "model")
    copy = shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copyfile)
    for name in ("README.md", "trainer_state.json", "training.json"):
        (copy / name).write_text("{}")
    assert model_digest(str(copy)) == model_digest(str(model)) != ""


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json",
                                  "generation_config.json", "chat_template.jinja", "merges.txt"])  # fmt: skip
def test_whatever_changes_answers_changes_the_digest(name: str, tmp_path: Path) -> None:
    model = folder(tmp_path / "model")
    before = model_digest(str(model))
    (model / name).write_text("Weights")  # of the same length as before
    assert model_digest(str(model)) != before


def test_an_adapters_digest_is_its_base_models_too(tmp_path: Path) -> None:
    base = folder(tmp_path / "base")
    adapter = folder(tmp_path / "adapter", config="adapter_config.json", base_model_name_or_path=str(base))
    before = model_digest(str(adapter))
    (base / "model.safetensors").write_bytes(b"trained")
    assert model_digest(str(adapter)) != before


def test_a_file_is_a_model_and_what_is_not_there_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert model_digest(str(tmp_path / "a.gguf")) != ""
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "none"), str(tmp_path / "empty"), "someone/no-such-model-here", "package:none_such/x"):
        assert model_digest(name) == ""
