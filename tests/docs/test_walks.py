"""The README's walk and CONTRIBUTING's examples, run as they stand there: on tiny stand-ins for models and data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from support import tiny
from support.markdown import ROOT, SHELL, Block, blocks

SMALL = {  # flags that keep a command of the README small; nothing else of it is changed
    "sample": ["--max_new_tokens", "6", "--device", "cpu", "--dtype", "float32"],
    "train": ["--max_steps", "2", "--device", "cpu", "--dtype", "float32", "--bf16", "false"],
}


def found(page: str, *languages: str) -> list[Block]:
    return [block for block in blocks(ROOT / page) if block.language in languages and block.reason is None]


def run_commands(block: Block, folder: Path, model: Path, only: tuple[str, ...] = ()) -> list[str]:
    """Run a block's ``rrhf`` commands in ``folder``; the names of those that ran."""
    ran = []
    for program, name, *arguments in block.commands():
        if program == "rrhf" and (not only or name in only):
            arguments = [str(model) if word == "MODEL" else word for word in arguments]
            tiny.warm(name, *arguments, *SMALL.get(name, []), cwd=folder).done()
            ran.append(name)
    return ran


def test_the_readmes_walk(model: Path, tmp_path: Path) -> None:
    reward = next(block for block in found("README.md", "python") if "def helpful" in block.text)
    (tmp_path / "my_rewards.py").write_text(reward.text, encoding="utf-8")
    rows = [{"chosen": f"\n\nHuman: Why {i}?\n\nAssistant: So.", "rejected": f"\n\nHuman: Why {i}?\n\nAssistant: No."}
            for i in range(4)]  # fmt: skip
    with gzip.open(tmp_path / "hh.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    walk = next(block for block in found("README.md", *SHELL) if "rrhf convert hh.jsonl.gz" in block.text)
    stages = ("convert", "sample", "score", "train")
    assert run_commands(walk, tmp_path, model, stages) == list(stages)
    scored = tiny.read_rows(tmp_path / "scored.jsonl")
    assert len(scored) == 4 and all(len(row["responses"]) == 6 for row in scored)  # four beams and the data set's two
    assert scored[0]["scores"] == [float(len(set(text.split()))) for text in scored[0]["responses"]]
    assert json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))["steps"] == 2


def test_the_examples_of_contributing(model: Path, tmp_path: Path) -> None:
    for block in found("CONTRIBUTING.md", "python", "json"):
        assert block.file is not None, block.place
        (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {
        "my_format.py", "my_policy.py", "my_reward.py", "my_loss.py", "quiz.jsonl",
    }  # fmt: skip
    ran = [name for block in found("CONTRIBUTING.md", *SHELL) for name in run_commands(block, tmp_path, model)]
    assert ran == ["convert", "sample", "score", "train"]
    queries = tiny.read_rows(tmp_path / "queries.jsonl")
    assert [(row["query"], row["scores"], row["topic"]) for row in queries] == [
        ("Which way does the river run?", [1, 0], "rivers"), ("How many lamps are there?", [0.5, 0], "lamps"),
    ]  # fmt: skip
    for row in tiny.read_rows(tmp_path / "scored.jsonl"):
        drawn = [source for source in row["sources"] if source.startswith("my_policy:min_p")]
        assert len(drawn) == 3 and len(row["responses"]) == 5
        shares = [sum(letter in text for letter in row["topic"]) / len(row["topic"]) for text in row["responses"]]
        assert row["scores"] == pytest.approx(shares) and "my_reward:on_topic" in row["rewards"]
    trained = json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))
    assert trained["steps"] == 2 and "my_loss:squared_hinge" in (tmp_path / "model" / "README.md").read_text("utf-8")
