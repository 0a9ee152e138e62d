"""Normalised rewards: hand-worked numbers, equal and missing scores, and the same file however it was made."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest

from rrhf.common.errors import UserError
from rrhf.common.scores import score_levels
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.rewards.combination import combination_of
from rrhf.rewards.normalise import Moments, data_moments, normalised
from rrhf.rewards.scoring import Rewards
from rrhf.rewards.stage import RewardSettings, ScoringSettings, score_file


def test_a_query_is_normalised_by_its_scored_responses_and_a_missing_score_stays_missing() -> None:
    assert normalised([1.0, None, 3.0]) == [-1.0, None, 1.0]
    assert normalised([None, None]) == [None, None]
    assert normalised([5.0]) == [0.0]
    assert normalised([0.3, 0.1 + 0.2, 0.3]) == [0.0, 0.0, 0.0]  # all equal, but for the last bit


def test_equal_scores_stay_equal() -> None:
    """Around a mean near them, two sums that differ in their last bit would differ by more than the tolerance."""
    values = [0.1 + 0.2, 0.3, 0.3 - 1e-3, 0.3 + 1e-3]
    scaled = [value for value in normalised(values) if value is not None]
    assert score_levels(scaled) == score_levels(values) == [1, 1, 0, 2]


def test_moments_are_those_of_all_values_at_once_far_from_zero_too() -> None:
    draw = random.Random(0)
    values = [1e6 + draw.gauss(0, 1) for _ in range(1000)]
    moments = Moments()
    for value in values:
        moments.add(value)
    assert moments.mean == pytest.approx(statistics.fmean(values), rel=1e-12)
    assert moments.deviation == pytest.approx(statistics.pstdev(values), rel=1e-6)


def test_each_reward_has_its_own_normalisation_and_weight_before_the_sum() -> None:
    record = Record(query="q", responses=["x", "y"], rewards={"a": [1.0, 3.0], "b": [100.0, 300.0], "c": [7.0, 7.5]})
    combination = combination_of(["a", "b", "c"], [2, 1, 1], ["query", "data", "none"])
    moments = data_moments([record, Record(query="r", responses=["z"], rewards={"b": [200.0]})], ["b"])
    b = 100 / statistics.pstdev([100.0, 300.0, 200.0])
    scored = combination.score(record, moments)
    assert scored.scores == pytest.approx([-2 - b + 7, 2 + b + 7.5])
    assert scored.rewards == record.rewards


def words(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None if "0" in completion else float(len(completion.split())) for completion in completions]


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


NAMES = [f"{__name__}:words", f"{__name__}:letters"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    draw = random.Random(1)
    texts = [
        " ".join(str(draw.randint(1, 10 ** draw.randint(1, 6))) for _ in range(draw.randint(1, 9))) for _ in range(60)
    ]
    rows = [Record(query=f"q{i}", responses=texts[3 * i : 3 * i + 3], id=f"q{i}") for i in range(20)]
    write_records(tmp_path / "data.jsonl", rows)
    return tmp_path / "data.jsonl"


def test_over_the_data_the_file_is_the_same_in_any_parts_and_after_a_stop(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring = ScoringSettings(reward_normalisation=["data", "query"])
    outputs = []
    for size in (1, 7, 512):
        monkeypatch.setattr("rrhf.rewards.stage.SCORING_PART", size)
        outputs.append(data.with_name(f"scored-{size}.jsonl"))
        if size == 7:  # dies while the scores are written, when all parts are there

            def dies(*arguments: object) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr("rrhf.rewards.combination.Combination.score", dies)
                score_file(data, outputs[-1], RewardSettings(NAMES), scoring)
            assert not outputs[-1].exists()
        score_file(data, outputs[-1], RewardSettings(NAMES), scoring)
    assert len({output.read_bytes() for output in outputs}) == 1
    records = list(read_records(outputs[0]))
    scored = [value for record in records for value in record.rewards[NAMES[0]] if value is not None]
    mean, deviation = statistics.fmean(scored), statistics.pstdev(scored)
    assert len(scored) < 60
    for record in records:
        first, second = record.rewards[NAMES[0]], normalised(record.rewards[NAMES[1]])
        expected = [None if r is None else (r - mean) / deviation + float(n or 0) for r, n in zip(first, second)]
        assert record.scores == pytest.approx(expected)


def test_over_the_data_needs_the_data() -> None:
    rewards = Rewards(NAMES, normalisation=["data"])
    with pytest.raises(UserError, match="moments are not known here"):
        next(rewards.score([Record(query="q", responses=["a"])]))
    with pytest.raises(UserError, match="give one, or one each"):
        Rewards(NAMES, normalisation=["query"] * 3)
