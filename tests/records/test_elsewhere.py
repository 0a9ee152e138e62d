"""Steps whose parts are made elsewhere: the same files, and the same folder of parts to go on from.

The pool is this process, but what it is given goes through pickle first, and comes back in another order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cloudpickle
import pytest

from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.records.elsewhere import Away, Read
from rrhf.records.record import Record
from rrhf.rewards import stage as scoring
from rrhf.rewards.stage import RewardSettings, ScoringSettings, score_file
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.stage import sample_file
from support import tiny


class StoppedError(Exception):
    pass


@dataclass
class Here:
    stop_after: int | None = None
    steps: list[str] = field(default_factory=list)
    made: list[int] = field(default_factory=list)

    def make(
        self, step: str, away: Away, numbers: Sequence[int], read: Read
    ) -> Iterator[tuple[int, list[Record], Counter[str]]]:
        opened, source = cloudpickle.loads(cloudpickle.dumps((away.open, read)))
        answer = opened()
        self.steps.append(step)
        for number, block in reversed(list(source(numbers))):
            if len(self.made) == self.stop_after:
                raise StoppedError
            counts: Counter[str] = Counter()
            answered = dict(answer(block, counts))
            self.made.append(number)
            yield number, away.settle([answered[i] for i in range(len(block))], counts), counts


def test_models_sample_elsewhere(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each of two models does its step there, in the order of the sources; a file of responses is read here."""
    data = tiny.write_rows(tmp_path / "queries.jsonl", tiny.rows(10, responses=0))
    human = tiny.write_rows(tmp_path / "human.jsonl", tiny.rows(10, responses=1))
    sources = [f"{model}@top-p:2", str(human), f"{model}@greedy:1"]
    sampling = SamplingSettings(max_new_tokens=5, batch_size=1, seed=3)

    def sample(output: str, pool: Here | None) -> bytes:
        caplog.clear()
        with caplog.at_level("INFO", "rrhf"):
            sample_file(data, tmp_path / output, ModelSettings(str(model), "cpu", "float32"), sampling,
                        TextSettings(max_query_length=6), sources=sources, pool=pool)  # fmt: skip
        return (tmp_path / output).read_bytes()

    pool = Here()
    elsewhere, counted = sample("elsewhere.jsonl", pool), caplog.messages[-1]
    assert elsewhere == sample("here.jsonl", None) and counted == caplog.messages[-1]
    assert pool.steps == ["sample model@top-p", "sample model@greedy"]
    assert pool.made == [2, 1, 0] * 2 and "queries were cut" in counted


def test_rewards_are_asked_elsewhere_but_for_what_is_here(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Functions, log-probabilities and sums travel; people's ratings stay; what is over all data is made at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoring, "SCORING_PART", 4)
    tiny.write_rewards(tmp_path)
    data = tiny.write_rows(tmp_path / "data.jsonl", tiny.rows(9, responses=3))
    ratings = [{"id": f"q{i}", "rater": "a", "response": j, "rating": i + j} for i in range(9) for j in range(3)]
    tiny.write_rows(tmp_path / "people.jsonl", ratings)
    names = [f"logprob:{model}", "people:people.jsonl", "tiny_rewards:vowels"]
    shaped = ScoringSettings(
        model=str(model), reference_model=str(model), kl_beta=0.1, device="cpu", dtype="float32",
        reward_normalisation=["none", "data", "query"],
    )  # fmt: skip

    def score(output: str, rewards: list[str], settings: ScoringSettings, pool: Here | None) -> bytes:
        score_file(data, tmp_path / output, RewardSettings(rewards), settings, pool=pool)
        return (tmp_path / output).read_bytes()

    pool = Here()
    assert score("elsewhere.jsonl", names, shaped, pool) == score("here.jsonl", names, shaped, None)
    assert pool.steps == [f"log-probabilities of {model}", f"score by logprob:{model}"]
    pool, plain = Here(), ScoringSettings()
    assert score("a.jsonl", names[2:], plain, pool) == score("b.jsonl", names[2:], plain, None)
    assert pool.steps == ["score"]


def test_what_came_back_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after two of three parts, the work goes on with the third alone, wherever that is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoring, "SCORING_PART", 4)
    tiny.write_rewards(tmp_path)
    data = tiny.write_rows(tmp_path / "data.jsonl", tiny.rows(9))
    rewards = RewardSettings(["tiny_rewards:vowels"])
    score_file(data, tmp_path / "whole.jsonl", rewards)
    for again in (Here(), None):
        output = tmp_path / f"{again is None}.jsonl"
        with pytest.raises(StoppedError):
            score_file(data, output, rewards, pool=Here(stop_after=2))
        entries = (tmp_path / f"{output.name}.parts/manifest-00000.jsonl").read_text().splitlines()
        assert [json.loads(entry)["part"] for entry in entries] == [2, 1]
        score_file(data, output, rewards, pool=again)
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert again is None or again.made == [0]
