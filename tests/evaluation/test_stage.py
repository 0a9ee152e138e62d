"""The evaluation's files: what a stopped evaluation has drawn is taken up only where it was made of the same."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrhf.common.errors import UserError
from rrhf.evaluation.stage import EvaluationSettings, evaluate_models, refuse_unusable
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.rewards.stage import RewardSettings
from rrhf.sampling.decoding import decode
from rrhf.sampling.settings import SamplingSettings
from support import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLING = SamplingSettings(policy="top-k", top_k=20, max_new_tokens=6, batch_size=4)


def characters(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    return [float(len(completion)) for completion in completions]


def other_weights(folder: Path) -> None:
    """Weights of the same shapes and file size in place of a model's."""
    file = folder / "model.safetensors"
    size = file.stat().st_size
    weights = {name: torch.roll(weight, 1, 0) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert file.stat().st_size == size


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Path:
    """A folder with held-out queries, the model, and an evaluation that stopped after it had drawn its texts."""
    tiny.write_rows(tmp_path / "held_out.jsonl", tiny.rows(5, responses=0))
    shutil.copytree(model, tmp_path / "model")
    evaluate(tmp_path)
    (tmp_path / "e.json").unlink()
    return tmp_path


def evaluate(folder: Path, sampling: SamplingSettings = SAMPLING, **options: Any) -> list[str]:
    """The texts that were evaluated."""
    reward = RewardSettings(reward=[options.pop("reward", f"{__name__}:characters")])
    evaluate_models(
        folder / "held_out.jsonl",
        folder / "e.json",
        {"pi": ModelSettings(str(folder / "model"), device="cpu", dtype="float32")},
        reward,
        sampling,
        options.pop("text", TextSettings()),
        options.pop("settings", EvaluationSettings()),
        **options,
    )
    return [row["pi"] for row in tiny.read_rows(folder / "e.generations.jsonl")]


def anew(folder: Path, **changed: Any) -> list[str]:
    """The texts of an evaluation in a place where nothing was drawn."""
    for file in folder.glob("e.*"):
        file.unlink()
    return evaluate(folder, **changed)


def test_what_was_drawn_is_taken_up(place: Path) -> None:
    drawn = (place / "e.pi.jsonl").stat()
    evaluate(place)
    again = (place / "e.pi.jsonl").stat()
    assert (again.st_ino, again.st_mtime_ns) == (drawn.st_ino, drawn.st_mtime_ns)


def test_a_copied_model_is_the_same_model(place: Path) -> None:
    drawn = (place / "e.pi.jsonl").stat()
    shutil.move(place / "model", place / "moved")
    shutil.copytree(place / "moved", place / "model", copy_function=shutil.copyfile)  # new times
    (place / "model" / "README.md").write_text("a card")
    evaluate(place)
    assert (place / "e.pi.jsonl").stat().st_mtime_ns == drawn.st_mtime_ns


@pytest.mark.parametrize("change", ["weights", "sampling", "text", "prompts", "drawn"])
def test_texts_made_of_something_else_are_drawn_anew(
    change: str, place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    stale = [row["responses"] for row in tiny.read_rows(place / "e.pi.jsonl")]
    if change == "weights":
        other_weights(place / "model")
        reason = "weights was "
    elif change == "sampling":
        options["sampling"] = replace(SAMPLING, seed=8)
        reason = "seed was 0, is 8"
    elif change == "text":
        options["text"] = TextSettings(max_query_length=2)
        reason = "max_query_length was None, is 2"
    elif change == "prompts":
        tiny.write_rows(place / "held_out.jsonl", [{**row, "query": "Why?"} for row in tiny.rows(5, responses=0)])
        reason = "prompts was "
    else:
        (place / "e.pi.jsonl").write_text(
            (place / "e.pi.jsonl").read_text().replace('"responses": ["', '"responses": ["x')
        )
        reason = "the file was changed since"
    monkeypatch.setattr(logging.getLogger("rrhf"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="rrhf"):
        found = evaluate(place, **options)
    assert reason in caplog.text and "drawn anew" in caplog.text
    assert found == anew(place, **options)
    if change != "drawn":
        assert [[text] for text in found] != stale


def test_texts_of_a_policy_whose_code_changed_are_drawn_anew(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from rrhf.sampling.policies import Draws\n\ndef make(settings, *how):\n    return Draws(settings, *how)\n"
    edited = "from dataclasses import replace\n" + code.replace(
        "(settings, *how)\n", "(replace(settings, seed=8), *how)\n"
    )
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(logging.getLogger("rrhf"), "propagate", True)
    found = []
    for text in (code, code, edited):
        (place / "own_policy.py").write_text(text)
        monkeypatch.delitem(sys.modules, "own_policy", raising=False)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="rrhf"):
            found.append((evaluate(place, replace(SAMPLING, policy="own_policy:make")), caplog.text))
    (first, _), (again, kept), (other, anew_because) = found
    assert again == first and "drawn anew" not in kept
    assert other != first and "policy_code was " in anew_because


def test_unfinished_texts_of_other_weights_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "e.pi.jsonl").unlink()
    sampling = replace(SAMPLING, batch_size=1)  # 4 queries in the first part, one in the second

    def interrupted(model: Any, queries: Any, *arguments: Any, calls: list[int] = []) -> Any:  # noqa: B006
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return decode(model, queries, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rrhf.sampling.decoding.decode", interrupted)
        evaluate(place, sampling)
    assert (place / "e.pi.jsonl.parts" / "part-0000000.jsonl").exists()
    other_weights(place / "model")
    with pytest.raises(UserError, match=r"weights was .*--overwrite"):
        evaluate(place, sampling)
    found = evaluate(place, sampling, overwrite=True)
    assert found == anew(place, sampling=sampling)


def test_overwrite_draws_anew(place: Path) -> None:
    drawn = (place / "e.pi.jsonl").stat()
    evaluate(place, overwrite=True)
    assert (place / "e.pi.jsonl").stat().st_mtime_ns > drawn.st_mtime_ns


def test_the_perplexity_models_context_is_looked_at_before_anything_is_drawn(place: Path, model: Path) -> None:
    (place / "e.pi.jsonl").unlink()
    judge = shutil.copytree(model, place / "judge")
    config = json.loads((judge / "config.json").read_text())
    (judge / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 6}))
    with pytest.raises(UserError, match=r"--max_new_tokens 6 .* context of 6 tokens of the perplexity model .*judge"):
        evaluate(place, settings=EvaluationSettings(perplexity_model=str(judge)))
    assert not (place / "e.pi.jsonl").exists()


def test_what_cannot_judge_new_texts_or_would_be_ignored_is_refused(place: Path) -> None:
    (place / "e.pi.jsonl").unlink()
    with pytest.raises(UserError, match="--reward provided: reads scores that records bring"):
        evaluate(place, reward="provided")
    with pytest.raises(UserError, match="--num_responses 3: an evaluation draws one"):
        evaluate(place, replace(SAMPLING, num_responses=3))
    with pytest.raises(UserError, match="--reward_weights: an evaluation shows every reward by itself"):
        refuse_unusable(RewardSettings([f"{__name__}:characters"], [2.0]), SAMPLING)
    assert not (place / "e.pi.jsonl").exists()


def test_an_unknown_reward_is_refused_before_anything_is_drawn(place: Path) -> None:
    (place / "e.pi.jsonl").unlink()
    with pytest.raises(UserError, match=r"no 'charcters'.*did you mean 'characters'"):
        evaluate(place, reward=f"{__name__}:charcters")
    assert not (place / "e.pi.jsonl").exists()
