"""Sampling and scoring on a real cluster whose nodes and workers die: the files of one process alone."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rrhf.cluster.pool import RayPool
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.records.elsewhere import Answer, Away, Read
from rrhf.records.record import Record
from rrhf.rewards import stage as scoring
from rrhf.rewards.stage import RewardSettings, score_file
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.stage import sample_file
from support import tiny
from support.nodes import Nodes

LONG = pytest.mark.skipif(not tiny.LONG, reason="seven passes through the cluster: RRHF_LONG=1")


@dataclass(frozen=True)
class Disturbed:
    """A pool; ``after`` that many parts, ``disturb`` is called; ``around`` is put around what the workers open."""

    pool: RayPool
    after: int = -1
    disturb: Callable[[], None] = lambda: None
    around: Callable[[Callable[[], Answer]], Callable[[], Answer]] = lambda opened: opened

    def make(
        self, step: str, away: Away, numbers: Sequence[int], read: Read
    ) -> Iterator[tuple[int, list[Record], Counter[str]]]:
        away = replace(away, open=self.around(away.open))
        for count, made in enumerate(self.pool.make(step, away, numbers, read)):
            if count == self.after:
                self.disturb()
            yield made


def dying(every: int, poison: str | None = None) -> Callable[[Callable[[], Answer]], Callable[[], Answer]]:
    """Workers that kill themselves at every n-th batch of theirs, and whenever they meet the response ``poison``."""

    def around(opened: Callable[[], Answer]) -> Callable[[], Answer]:
        def wrapped() -> Answer:
            answer, calls = opened(), 0

            def watched(block: list[Record], counts: Counter[str]) -> Iterator[tuple[int, Record]]:
                nonlocal calls
                calls += 1
                if calls % every == 0 or any(poison in record.responses for record in block):
                    os.kill(os.getpid(), signal.SIGKILL)
                return answer(block, counts)

            return watched

        return wrapped

    return around


def test_a_node_dies_while_sampling(nodes: Nodes, tmp_path: Path) -> None:
    nodes.have(2)
    data = tiny.write_rows(tmp_path / "queries.jsonl", tiny.rows(24, responses=0))
    model = ModelSettings(str(tiny.write_model(tmp_path / "model")), "cpu", "float32")
    sampling = SamplingSettings(policy="top-p", num_responses=3, max_new_tokens=6, batch_size=1, seed=3)

    def sample(output: str, pool: Any = None) -> bytes:
        sample_file(data, tmp_path / output, model, sampling, TextSettings(), pool=pool)
        assert not (tmp_path / f"{output}.parts").exists()
        return (tmp_path / output).read_bytes()

    undisturbed = sample("alone.jsonl")
    assert sample("cluster.jsonl", Disturbed(RayPool(nodes.settings()), 1, nodes.kill)) == undisturbed


@pytest.mark.parametrize("deadly", [False, pytest.param(True, marks=LONG)])
def test_workers_and_a_node_die_while_scoring(
    deadly: bool, nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third batch kills its worker, and a deadly response any: it alone is null."""
    nodes.have(2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoring, "SCORING_PART", 4)
    tiny.write_rewards(tmp_path)
    rows = tiny.rows(24, responses=3)
    poison = rows[9]["responses"][1] = "This one is deadly."
    data = tiny.write_rows(tmp_path / "responses.jsonl", rows)
    rewards = RewardSettings(["tiny_rewards:vowels", "tiny_rewards:spaces"])

    def score(output: str, pool: Any = None) -> list[dict[str, Any]]:
        score_file(data, tmp_path / output, rewards, pool=pool)
        return tiny.read_rows(tmp_path / output)

    undisturbed = score("alone.jsonl")
    pool = Disturbed(RayPool(nodes.settings()), 2, nodes.kill, dying(3, poison if deadly else None))
    disturbed = score("cluster.jsonl", pool)
    if deadly:
        for values in (undisturbed[9]["scores"], *undisturbed[9]["rewards"].values()):
            values[1] = None
    assert disturbed == undisturbed
