"""A run's estimate: counted by hand, measured for real, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rrhf.cli.main import main
from rrhf.models.load import ModelSettings, tokenizer_and_config
from rrhf.models.locate import locate
from rrhf.recipes import estimate
from rrhf.recipes.config import merge, parse_config
from rrhf.recipes.estimate import RECORD_SECONDS, estimate_run
from rrhf.recipes.speed import EVALUATED_SHARE, Shape, Speed, measure_machine
from rrhf.sampling.settings import SamplingSettings
from support import tiny


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration of 20 queries, in the folder where its data lie."""
    config = tiny.config(model)
    monkeypatch.chdir(tiny.workplace(tmp_path / "work", config))
    monkeypatch.syspath_prepend(str(tmp_path / "work"))
    return config


def stages(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, estimate.Stage]:
    """6 s a token of a query's sampled responses, so that a query of responses of 6 tokens takes 36."""
    monkeypatch.setattr(
        estimate, "measure_machine", lambda model, shape, sampling: Speed(6.0 * shape.response, 72.0, 3.6)
    )
    found = estimate_run(parse_config(merge(config, changes), Path("model")))
    return {stage.name: stage for stage in found.stages}


def test_stages_by_hand(place: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = stages(place, monkeypatch)
    assert [found[name].records for name in found] == [20, 20, 20, 40, 18]
    rows, sampled = 20 * RECORD_SECONDS / 3600, found["sample"]
    assert found["data"].size == sum(map(len, Path("data.jsonl").read_bytes().splitlines(keepends=True)[:20]))
    assert sampled.hours == pytest.approx(rows + 20 * 36 / 3600)
    assert found["train"].hours == pytest.approx((40 * 72 + 10 * 3.6) / 3600) and found["train"].note == "10 steps"
    assert found["score"].hours == pytest.approx(rows) and "functions' own time" in found["score"].note
    longer = stages(place, monkeypatch, sample={"max_new_tokens": 16})["sample"]
    assert longer.tokens - sampled.tokens == pytest.approx(20 * 3 * 10)  # 3 responses of up to 10 tokens more
    assert longer.hours == pytest.approx(rows + 20 * 96 / 3600)  # however long those are that the data bring
    twice = stages(place, monkeypatch, iterations=2)
    assert all(twice[name].hours == pytest.approx(2 * found[name].hours) for name in ("sample", "score", "train"))
    assert twice["evaluate"] == found["evaluate"]


def test_an_evaluation_where_nothing_is_sampled(place: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its responses are as long as they may get; the speed is of those that the data provides."""
    shapes: list[Shape] = []
    monkeypatch.setattr(
        estimate, "measure_machine", lambda model, shape, sampling: shapes.append(shape) or Speed(36.0, 72.0, 3.6)
    )
    found = estimate_run(parse_config(merge(place, {"sample": None}), Path("model"))).stages[-1]
    assert found.name == "evaluate" and shapes[0].response > 1
    assert found.hours == pytest.approx(18 * EVALUATED_SHARE * 36 * 6 / shapes[0].response / 3600)


def test_servers_and_judges_are_asked(place: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stages(
        place, monkeypatch, sample={"source": ["http://localhost:1/v1@chat:2", f"{place['model']}@top-p:1"]}
    )["sample"]
    assert asked.requests == 40 and asked.note == "a server's time"
    assert asked.hours == pytest.approx(20 * (RECORD_SECONDS + 12) / 3600)  # a third of the responses is drawn here
    scored = stages(place, monkeypatch, score={"reward": ["judge:none.yaml", "tiny_rewards:vowels"]})["score"]
    assert scored.requests == 20 and "the judge's time" in scored.note


def test_a_model_that_does_not_fit_is_reckoned_by_operations(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda device: 1000)
    monkeypatch.setattr(estimate, "measure_machine", None)
    found = estimate_run(parse_config(place, Path("model")))
    assert "not measured here" in found.table() and estimate.ELSEWHERE in found.table()
    assert all(stage.hours > 0 for stage in found.stages)
    _, described = tokenizer_and_config(locate(place["model"]), place["model"])
    a_token = 2 * estimate.count_parameters(described) / estimate.SAMPLED_RATE
    for provided in (False, True):  # what the data bring is not decoded
        config = parse_config(merge(place, {"data": {"provided": provided}}), Path("model"))
        sampled = estimate_run(config).stages[1]
        seconds = sampled.hours * 3600 / 20 - RECORD_SECONDS
        assert 18 < seconds / a_token <= sampled.tokens / 20


def test_a_dry_run_writes_nothing(place: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert main(["run", "config.yaml", "--output", "run", "--dry_run", "train.num_train_epochs=1"]) == 0
    assert main(["run", "config.yaml", "--dry-run"]) == 0
    assert sorted(Path().rglob("*")) == before
    said = capsys.readouterr().out
    assert "machine hours" in said and "measured now on" in said and "5 steps" in said
    assert main(["run", "config.yaml"]) == 2


def test_a_machine_is_measured_with_the_models_own_work(model: Path) -> None:
    sampling = SamplingSettings(policy="diverse-beam", num_beams=2)
    speed = measure_machine(ModelSettings(model=str(model), device="cpu"), Shape(12, 6, 3), sampling)
    assert speed.sampled > 0 and speed.trained > 0 and speed.optimised > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["config.yaml", "model=nowhere"], "--model nowhere: cannot be loaded"),
        (["config.yaml", "score.reward=[nonsense:f]"], "nonsense"),
        (["config.yaml", "--cluster", "x"], "--cluster x: give auto, local or HOST:PORT"),
        ([], "the following arguments are required: config;"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.workplace(tmp_path, tiny.config(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["run", "--dry_run", *given]) == 2
    assert message in capfd.readouterr().err


def test_a_source_without_records_is_told(place: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("my_data.py").write_text("def none(limit, seed):\n    return []\n")
    assert main(["run", "config.yaml", "--dry_run", "data.source=my_data:none"]) == 2
    assert "data: my_data:none has no records" in capsys.readouterr().err
