"""The shipped configurations of Wombat and of its baseline, run to the end on a tiny model with a judge on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import misbehaving as bad
from support import tiny
from support.judge_replies import ASPECTS

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")


@pytest.fixture
def server() -> Iterator[bad.Misbehaving]:
    """A judge that writes lines, likes long responses, and has nothing to say of one query."""

    def behave(handler: bad.Handler, body: dict[str, Any]) -> None:
        prompt = body["messages"][-1]["content"]
        texts = re.findall(r"Response \d+:\n<<begin .*>>\n([\s\S]*?)\n<<end", prompt)
        lines = [
            f"Response {n}: " + ", ".join(f"{name}: {min(5, 1 + len(text) // 8)}" for name in ASPECTS)
            for n, text in enumerate(texts, 1)
        ]
        sulks = "instruction 7\n" in prompt
        handler.send_json(bad.answer(body, ["No." if sulks else "\n".join(lines)]))

    with bad.misbehaving() as running:
        running.default = behave
        yield running


def systems() -> list[dict[str, Any]]:
    """Rows in AlpacaFarm's layout."""
    words = [sentence.split() for sentence in tiny.SENTENCES]
    return [
        {
            "instruction": f"instruction {i}",
            "input": "",
            "outputs": {f"s{j}": " ".join(words[(i + j) % 8][: 2 + 2 * j]) for j in range(3)},
        }
        for i in range(14)
    ]


def test_both_arms_run_to_the_end(server: bad.Misbehaving, tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "systems.jsonl", systems())
    (tmp_path / "judge.yaml").write_text(f"url: {server.url}\nmodel: m\ntries: 2\n", encoding="utf-8")
    small = [
        f"model={model}", "device=cpu", "dtype=float32", "data.held_out_limit=4", "train.num_train_epochs=1",
        "train.gradient_accumulation_steps=2", "train.max_length=64", "train.report_to=none", "train.bf16=false",
        "evaluate.max_new_tokens=6",
    ]  # fmt: skip
    tiny.warm("run", "wombat", "--output", "wombat", *small, cwd=tmp_path).done()
    scored = {row["query"][0]["content"]: row for row in tiny.read_rows(tmp_path / "wombat/scored.jsonl")}
    assert len(scored) == 10
    assert scored["instruction 7"]["scores"] == [None] * 3
    assert all(row["scores"][0] < row["scores"][2] for name, row in scored.items() if name != "instruction 7")
    assert scored["instruction 9"]["sources"] == ["system/s0", "system/s1", "system/s2"]
    evaluation = json.loads((tmp_path / "wombat/evaluation.json").read_text())
    assert evaluation["pi"]["n"] == 4 and evaluation["pi"]["reward_mean"] is not None

    tiny.warm("run", "wombat-sft", "--output", "sft", *small, "score.reward=[source:system/s2]", cwd=tmp_path).done()
    fitted = tiny.read_rows(tmp_path / "sft/scored.jsonl")
    assert all(row["scores"] == [None, None, 1.0] for row in fitted) and len(fitted) == 10
    assert (tmp_path / "sft/model/model.safetensors").exists()
