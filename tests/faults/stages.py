"""The stages that faults are put into: how each is set up, its command, and what it must come to in the end."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from support import misbehaving as bad
from support import tiny
from support.judge_replies import ASPECTS

MODEL = ("--model", "../model", "--device", "cpu", "--dtype", "float32")
TRAINING = (
    "--bf16", "false", "--max_steps", "4", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
    "--learning_rate", "1e-3", "--max_length", "64", "--report_to", "none", "--save_steps", "1", "--logging_steps", "1",
)  # fmt: skip
SMALL_PARTS = [tiny.put("rrhf.rewards.stage:SCORING_PART", 4), tiny.put("rrhf.sampling.stage:REMOTE_PART", 4)]
WEIGHTS = "out/model.safetensors"


@dataclass(frozen=True)
class Stage:
    """A command, the files that must be the same however often it was disturbed, and what is laid ready for it.

    ``poisoned``: the method of its trainer after which a gradient can be spoilt.
    """

    command: tuple[str, ...]
    results: tuple[str, ...]
    output: str
    prepare: Callable[[Path, World], None] = lambda folder, world: None
    poisoned: str | None = None
    ids: str | None = None  # a result that must hold every record once


@dataclass
class World:
    """What all folders of a test share: a model beside them, a server, and runs that nothing disturbed."""

    place: Path
    server: bad.Misbehaving
    _whole: dict[str, Path] = field(default_factory=dict)
    _moments: dict[str, int] = field(default_factory=dict)

    def folder(self, name: str, stage: str) -> Path:
        folder = tiny.workplace(self.place / name, config(self.place / "model"), tiny.rows(12))
        STAGES[stage].prepare(folder, self)
        return folder

    def run(self, stage: str, folder: Path, *faults: dict[str, Any]) -> tiny.Result:
        return tiny.warm(*self.command(stage), cwd=folder, faults=[*SMALL_PARTS, *faults])

    def command(self, stage: str) -> list[str]:
        return [word.replace("{server}", self.server.url) for word in STAGES[stage].command]

    def whole(self, stage: str) -> Path:
        """The folder of an undisturbed one; how many moments it has to die at is counted on the way."""
        if stage not in self._whole:
            folder = self.folder(f"{stage}-whole", stage)
            self.run(stage, folder).done()
            self._whole[stage] = folder
        return self._whole[stage]

    def moments(self, stage: str) -> int:
        """How many moments a command has to die at, counted in one that nothing disturbs."""
        if stage not in self._moments:
            folder, counted = self.folder(f"{stage}-counted", stage), self.place / f"{stage}-moments"
            self.run(stage, folder, {"at": "rrhf:", "lines": str(counted)}).done()
            self._moments[stage] = int(counted.read_text())
            shutil.rmtree(folder)
        return self._moments[stage]

    def lost(self, stage: str, folder: Path) -> list[str]:
        """What is not as in the undisturbed one: nothing, if all is well."""
        whole, found = self.whole(stage), []
        for name in STAGES[stage].results:
            mine, other = folder / name, whole / name
            if not mine.exists() or _comparable(mine) != _comparable(other):
                found.append(f"{name} differs")
        if name := STAGES[stage].ids:
            ids = [row["id"] for row in tiny.read_rows(folder / name)]
            if len(set(ids)) != len(ids) or ids != [row["id"] for row in tiny.read_rows(whole / name)]:
                found.append("records are lost or twice")
        rest = [p for p in folder.rglob("*") if p.suffix in (".parts", ".tmp") or p.name.startswith("checkpoint-")]
        return found + [f"left over: {path.relative_to(folder)}" for path in rest]


def _comparable(path: Path) -> Any:
    """The content without how long it took."""
    if path.is_dir():
        rows = [json.loads(file.read_text()) for file in sorted(path.glob("*.json"))]
        return [{k: v for k, v in row.items() if k not in UNEQUAL} for row in rows]
    return path.read_bytes()


UNEQUAL = {"seconds", "load", "peak_memory_bytes", "config", "commit"}  # of two computations of one result


def config(model: Path) -> dict[str, Any]:
    """A run of 8 queries in 4 steps."""
    settings = tiny.config(model)
    settings["data"] = {"source": "data.jsonl", "limit": 8, "held_out_limit": 3}
    settings["sample"] |= {"num_responses": 2, "max_new_tokens": 4}
    settings["train"] |= {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_steps": 1}
    settings["evaluate"] |= {"max_new_tokens": 4, "batch_size": 3}
    return settings


# --- what is laid ready ----------------------------------------------------------------------------------------------


def _online(folder: Path, world: World) -> None:
    settings = config(world.place / "model")
    settings["sample"]["batch_size"] = 1
    settings["train"] |= {"resample_steps": 2, "save_steps": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def _finished_run(folder: Path, world: World) -> None:
    shutil.copytree(world.whole("run") / "run", folder / "run", symlinks=True)


def _judge(folder: Path, world: World) -> None:
    text = f"url: {world.server.url}\nmodel: m\n"
    (folder / "judge.yaml").write_text(text, encoding="utf-8")
    questions = [{"question_id": i, "category": "prose", "turns": [f"Question number {i}?"]} for i in range(6)]
    tiny.write_rows(folder / "questions.jsonl", questions)
    for name, size in (("a", 4), ("b", 2)):
        rows = [{"query": row["turns"][0], "responses": ["x" * size]} for row in questions]
        tiny.write_rows(folder / f"{name}.jsonl", rows)


def _reproduce(folder: Path, world: World) -> None:
    settings = config(world.place / "model")
    del settings["seed"]
    settings["data"] = {"source": "data.jsonl", "limit": 4, "held_out_limit": 2}
    settings["sample"] = {"max_new_tokens": 4, "batch_size": 8}
    settings["train"] |= {"max_steps": 2, "save_strategy": "no"}
    settings["evaluate"] |= {"top_k": 5}
    settings["reproduce"] = {"learning_rates": [1e-3], "rate_queries": 1, "chosen": "human/0"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


RUN_RESULTS = (
    "run/queries.jsonl", "run/held_out.jsonl", "run/responses.jsonl", "run/scored.jsonl",
    "run/model/model.safetensors", "run/evaluation.json",
)  # fmt: skip
REPRODUCE = ("reproduce", "imdb", "--scale", "tiny.yaml", "--arms", "start,RRHF-DP", "--learning_rate", "1e-3")
STEP = "rrhf.training.trainer:RRHFTrainer.training_step"

STAGES = {
    "run": Stage(("run", "config.yaml", "--output", "run"), RUN_RESULTS, "run", poisoned=STEP, ids="run/scored.jsonl"),
    "sample": Stage(
        ("sample", *MODEL, "--data", "data.jsonl", "--policy", "top-p", "--num_responses", "2", "--max_new_tokens", "5",
         "--batch_size", "2", "--output", "out.jsonl"),
        ("out.jsonl",), "out.jsonl", ids="out.jsonl",
    ),
    "source": Stage(
        ("sample", *MODEL[2:], "--data", "data.jsonl", "--source", "{server}@chat:2", "--concurrency", "2",
         "--max_new_tokens", "5", "--output", "out.jsonl"),
        ("out.jsonl",), "out.jsonl", ids="out.jsonl",
    ),
    "score": Stage(
        ("score", "--data", "data.jsonl", "--reward", "tiny_rewards:vowels", "logprob:../model", "--device", "cpu",
         "--dtype", "float32", "--output", "out.jsonl"),
        ("out.jsonl",), "out.jsonl", ids="out.jsonl",
    ),
    "train": Stage(("train", *MODEL, "--data", "data.jsonl", "--output", "out", *TRAINING), (WEIGHTS,), "out",
                   poisoned=STEP),
    "evaluate": Stage(
        ("evaluate", *MODEL, "--data", "data.jsonl", "--reward", "tiny_rewards:vowels", "--policy", "top-k", "--top_k",
         "9", "--max_new_tokens", "4", "--batch_size", "4", "--output", "out.json"),
        ("out.json", "out.generations.jsonl"), "out.json",
    ),
    "reward-model": Stage(
        ("reward-model", *MODEL, "--data", "data.jsonl", "--eval_data", "data.jsonl", "--output", "out", *TRAINING),
        (WEIGHTS, "out/reward-model.json"), "out",
        poisoned="rrhf.training.reward_model.trainer:RewardTrainer.training_step",
    ),
    "judge": Stage(
        ("judge", "--questions", "questions.jsonl", "--a", "a.jsonl", "--b", "b.jsonl", "--output", "out.json",
         "--samples", "9", "--judge", "judge.yaml"),
        ("out.json",), "out.json", prepare=_judge,
    ),
    "report": Stage(("report", "run", "--output", "report.html"), ("report.html",), "report.html",
                    prepare=_finished_run),
    "online": Stage(("run", "config.yaml", "--output", "run"), (*RUN_RESULTS[:2], *RUN_RESULTS[4:]), "run",
                    prepare=_online, poisoned=STEP),
    "ppo": Stage(
        ("baseline", "ppo", *MODEL, "--data", "data.jsonl", "--reward", "tiny_rewards:vowels", "--output", "out",
         "--rollout_queries", "4", "--num_responses", "2", "--max_new_tokens", "4",
         "--per_device_train_batch_size", "2", "--ppo_epochs", "1", "--max_steps", "6", "--save_steps", "2",
         "--learning_rate", "0.01"),
        (WEIGHTS,), "out", poisoned="rrhf.training.ppo:PPO._gradient",
    ),
    "reproduce": Stage((*REPRODUCE, "--output", "out"), ("out/results",), "out", prepare=_reproduce),
}  # fmt: skip


# About how many lines of the package a command runs, for tests that do not wait for the count: moments to die at.
MOMENTS = {
    "run": 150_000, "sample": 45_000, "source": 15_000, "score": 24_000, "train": 45_000, "evaluate": 44_000,
    "reward-model": 33_000, "judge": 15_000, "report": 13_000, "online": 200_000, "ppo": 80_000, "reproduce": 220_000,
}  # fmt: skip


def judged(handler: bad.Handler, body: dict[str, Any]) -> None:
    """A judge whose scores depend on the texts alone; others are answered well."""
    if "Response 1" not in str(body["messages"][-1]["content"]):
        return bad.well(handler, body)
    texts = re.findall(r"Response \d+:\n<<begin .*>>\n(.*)\n<<end", body["messages"][-1]["content"])
    scores = {f"Response {n}": dict.fromkeys(ASPECTS, 1 + len(text) % 5) for n, text in enumerate(texts, 1)}
    handler.send_json(bad.answer(body, [json.dumps(scores)]))


@contextmanager
def a_world(place: Path) -> Iterator[World]:
    tiny.write_model(place / "model")
    with bad.misbehaving() as server:
        server.default = judged
        yield World(place, server)
