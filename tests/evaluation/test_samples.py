"""Training samples as rows of Table 6, by source, with lengths: against the plain sums."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from rrhf.common.errors import UserError
from rrhf.evaluation.samples import measure_samples


def test_rows_by_source_are_the_plain_sums(tmp_path: Path) -> None:
    rng = random.Random(4)
    rows = []
    for i in range(40):
        k = rng.choice([3, 4])
        scores = [rng.gauss(-1.2, 0.7) if rng.random() > 0.1 else None for _ in range(k)]
        rows.append(
            {
                "query": f"q{i}",
                "responses": ["x" * rng.randrange(1, 60) for _ in range(k)],
                "sources": ["human/chosen", *(f"beam/{j}" for j in range(k - 1))],
                "finish": [rng.choice(["stop", "length"]) for _ in range(k)],
                "scores": scores,
            }
        )
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    samples = measure_samples(path, "no such reward", seed=1)
    assert samples is not None and samples.reward is None

    every = [(row, j, s) for row in rows for j, s in enumerate(row["scores"]) if s is not None]  # type: ignore[arg-type]
    values = [s for _, _, s in every]
    best = [max(s for s in row["scores"] if s is not None) for row in rows if any(s is not None for s in row["scores"])]  # type: ignore[union-attr]
    assert samples.mean["mean"] == pytest.approx(np.mean(values)) and samples.std == pytest.approx(np.std(values))
    assert samples.mean["low"] < samples.mean["mean"] < samples.mean["high"]
    assert samples.mean_max["mean"] == pytest.approx(np.mean(best))
    assert samples.curve[0]["n"] == 1 and samples.curve[-1]["n"] == 4
    beam, human = samples.by_source
    assert (beam.name, human.name) == ("beam", "human/chosen")
    theirs = [(row, j, s) for row, j, s in every if j > 0]
    assert beam.n == len(theirs) and beam.mean["mean"] == pytest.approx(np.mean([s for _, _, s in theirs]))
    assert beam.std == pytest.approx(np.std([s for _, _, s in theirs]))
    assert beam.length["mean"] == pytest.approx(np.mean([len(row["responses"][j]) for row, j, _ in theirs]))  # type: ignore[index]
    assert beam.cut == pytest.approx(np.mean([row["finish"][j] == "length" for row, j, _ in theirs]))  # type: ignore[index]
    assert beam.best + human.best == pytest.approx(1.0) and beam.share + human.share == pytest.approx(1.0)


def test_a_win_is_shared_by_those_who_tie(tmp_path: Path) -> None:
    row = {"query": "q", "responses": ["a", "bb", "c"], "sources": ["x/0", "x/1", "y"], "scores": [0.3, 0.1 + 0.2, 0.3]}
    path = tmp_path / "scored.jsonl"
    path.write_text(json.dumps(row) + "\n")
    samples = measure_samples(path, None)
    assert samples is not None and samples.no_pairs == 1 and samples.correlation is None
    assert [source.best for source in samples.by_source] == pytest.approx([2 / 3, 1 / 3])


def test_an_empty_response_counts_and_a_record_without_scores_is_named(tmp_path: Path) -> None:
    """A model may end at once: in best-of-n that is a draw like any other."""
    path = tmp_path / "scored.jsonl"
    row = {"query": "q", "responses": ["", "a"], "sources": ["x/0", "x/1"], "finish": ["stop", "stop"]}
    path.write_text(json.dumps({**row, "scores": [0.2, 0.4]}) + "\n")
    samples = measure_samples(path, None)
    assert samples is not None and samples.mean["mean"] == pytest.approx(0.3)
    path.write_text(json.dumps({**row, "id": "nameless"}) + "\n")
    with pytest.raises(UserError, match="nameless"):
        measure_samples(path, None)
