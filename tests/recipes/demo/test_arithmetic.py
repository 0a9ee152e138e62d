"""The worked example of a verifiable reward, from the configuration to the report, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

from rrhf.records.files import read_records
from support import tiny


def test_the_example_runs_and_checks_the_answers(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    tiny.warm(
        "run", "arithmetic", "--output", "run", f"model={model}", "data.limit=6", "data.held_out_limit=4",
        "sample.num_responses=3", "train.num_train_epochs=1", "train.per_device_train_batch_size=3", "train.bf16=false",
        "train.select=best-worst", "train.ties=half", cwd=tmp_path,
    ).done()  # fmt: skip
    records = list(read_records(tmp_path / "run" / "scored.jsonl", require="scores"))
    assert len(records) == 6
    for record in records:
        scores = dict(zip(record.sources, record.scores, strict=True))
        assert scores["book/answer"] == 1.0 and set(scores.values()) <= {0.0, 1.0}
        assert record.responses[record.sources.index("book/answer")] == f" {record.extra['answer']}"
    summary = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert summary["settings"]["select"] == "best-worst" and summary["settings"]["ties"] == "half"
    scored = sum(len(record.scores) for record in records)
    assert summary["left_out"] == scored - sum(len(set(record.scores)) for record in records) > 0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["pi"]["n"] == evaluation["rho"]["n"] == 4
