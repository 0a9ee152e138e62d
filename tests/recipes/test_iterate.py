"""IP-n on a tiny random model through the command line: rounds that go on from each other, killed anywhere."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from rrhf.models.identity import model_digest
from rrhf.report.load import load_run
from rrhf.report.rows import facts
from rrhf.rewards.logprob import reference_sums_name
from support import tiny
from support.tiny import die

RUN = ("run", "config.yaml", "--output", "run")
DECODE = "rrhf.sampling.decoding:decode"
STEP = "rrhf.training.trainer:RRHFTrainer.training_step"
IN_ROUND = ("responses.jsonl", "scored.jsonl", "model/model.safetensors", "evaluation.json", "config.yaml")
RESULTS = [
    "queries.jsonl", "held_out.jsonl", "evaluation.generations.jsonl",
    *(f"rounds/{number}/{name}" for number in (1, 2) for name in IN_ROUND),
]  # fmt: skip


def config(model: Path) -> dict[str, Any]:
    """Two rounds of 12 queries: 3 parts of sampling and 3 steps each, with a checkpoint after the second."""
    settings = tiny.config(model) | {"iterations": 2, "evaluate_rounds": 2}
    settings["data"] = {"source": "data.jsonl", "limit": 12, "held_out_limit": 4}
    settings["sample"] |= {"batch_size": 1, "num_responses": 2, "max_new_tokens": 4}
    settings["train"] |= {"num_train_epochs": 1, "ranking_loss": "dpo"}
    settings["evaluate"] |= {"reward": ["tiny_rewards:vowels"], "max_new_tokens": 4, "batch_size": 4}
    return settings


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.workplace(tmp_path_factory.mktemp("undisturbed"), config(model))
    tiny.warm(*RUN, cwd=folder).done()
    return folder / "run"


KILLS = {
    "round 1, sample, in the second part": [die(DECODE, 6)],
    "between the rounds": [die("rrhf.recipes.iterate:write_text", 1)],
    "round 2, sample, in the third part": [die(DECODE, 10)],
    "round 2, train, after a checkpoint": [die(STEP, 3)],
    "before the run shows its last round": [die("rrhf.recipes.run_folder:RunFolder.show", 1)],
}


def test_killed_in_and_between_rounds_and_resumed(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, config(model))
    for where, faults in KILLS.items():
        # The configuration of round 1 stands there when the second fault is put in.
        killed = tiny.warm(*RUN, cwd=folder, faults=faults)
        assert killed.code == -signal.SIGKILL, (where, killed.err[-2000:])
    tiny.warm(*RUN, cwd=folder).done()
    different = [name for name in RESULTS if (folder / "run" / name).read_bytes() != (undisturbed / name).read_bytes()]
    assert not different


def test_a_round_goes_on_from_the_last_and_is_compared_with_the_first(undisturbed: Path, model: Path) -> None:
    rounds = [undisturbed / "rounds" / str(number) for number in (1, 2)]
    made_of = [json.loads((folder / "made-of.json").read_text()) for folder in rounds]
    first, second = model_digest(str(model)), model_digest(str(rounds[0] / "model"))
    assert list(made_of[0]["sample"].values())[1] == list(made_of[0]["train"].values())[1] == first
    assert list(made_of[1]["sample"].values())[1] == list(made_of[1]["train"].values())[1] == second
    for folder, prompts in zip(rounds, (2, 4)):
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert evaluation["settings"]["models"]["rho"] == evaluation["perplexity_model"] == str(model)
        assert evaluation["rho"]["n"] == prompts
    names = [json.loads((folder / "model/training-settings.json").read_text())["reference_sums"] for folder in rounds]
    assert names == [reference_sums_name(str(model), None, 64)] * 2
    drawn = [[row["responses"][2:] for row in tiny.read_rows(folder / "responses.jsonl")] for folder in rounds]
    assert drawn[0] != drawn[1]


def test_a_round_draws_with_the_next_seed(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    """Round 2's samples are those of `rrhf sample` by round 1's model with the seed after the run's."""
    settings = config(model)
    flags = {**settings["sample"], "seed": settings["seed"] + 1}
    tiny.warm(
        "sample", "--model", str(undisturbed / "rounds/1/model"), "--data", str(undisturbed / "queries.jsonl"),
        "--output", "again.jsonl", "--device", "cpu", "--dtype", "float32",
        *(f"--{name}={value}" for name, value in flags.items()), cwd=tmp_path,
    ).done()  # fmt: skip
    again, drawn = (tiny.read_rows(file) for file in (tmp_path / "again.jsonl", undisturbed / "responses.jsonl"))
    assert [row["responses"] for row in again] == [row["responses"] for row in drawn]


def test_the_run_shows_its_last_round_and_the_report_all_of_them(undisturbed: Path) -> None:
    for name in ("responses.jsonl", "scored.jsonl", "model", "evaluation.json"):
        assert (undisturbed / name).readlink() == Path("rounds/2") / name
    page = (undisturbed / "report.html").read_text(encoding="utf-8")
    assert "rounds/1" in page and "rounds/2" in page
    second = load_run(undisturbed / "rounds/2")
    assert second.settings["model"] == "rounds/1/model"  # what it begins with, wherever the run lies
    models = json.loads((undisturbed / "evaluation.json").read_text())["settings"]["models"]
    assert facts(second)["Model (ρ)"] == models["rho"] != models["pi"]
    timings = json.loads((undisturbed / "timings.json").read_text())
    of_rounds = [json.loads((undisturbed / f"rounds/{n}/timings.json").read_text()) for n in (1, 2)]
    assert timings["train"] == pytest.approx(sum(times["train"] for times in of_rounds), abs=0.1)


def test_the_first_round_is_the_run_without_rounds(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    """IP-1 = DP."""
    folder = tiny.workplace(tmp_path, config(model) | {"iterations": 1})
    killed = tiny.warm(*RUN, cwd=folder, faults=[die("rrhf.recipes.offline:evaluate_models", 1)])
    assert killed.code == -signal.SIGKILL
    for name in ("scored.jsonl", "model/model.safetensors"):
        assert (folder / "run" / name).read_bytes() == (undisturbed / "rounds/1" / name).read_bytes()
    refused = tiny.warm(*RUN, "iterations=2", cwd=folder)
    assert refused.code == 2 and "holds a run without rounds" in refused.err


def test_more_rounds_go_on_from_those_that_are_there(undisturbed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed.parent, tmp_path / "copy", symlinks=True)
    weights = folder / "run/rounds/2/model/model.safetensors"
    before = weights.stat().st_mtime_ns
    killed = tiny.warm(*RUN, "iterations=3", cwd=folder, faults=[die("rrhf.recipes.offline:evaluate_models", 1)])
    assert killed.code == -signal.SIGKILL, killed.err[-2000:]
    assert weights.stat().st_mtime_ns == before
    made_of = json.loads((folder / "run/rounds/3/made-of.json").read_text())
    assert model_digest(str(weights.parent)) in made_of["train"].values()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sample=null"], "sample: null: without samples every round"),
        (["sample.source=[http://localhost:1/v1@chat:2]"], "no round would sample from the one that was trained"),
        (["train.peft=lora", "train.merge_adapter=false"], "train.merge_adapter: false"),
        (["iterations=0"], "--iterations 0: must be at least 1"),
        (["train.resample_steps=2"], "either rounds or sampling while training"),
    ],
)
def test_what_cannot_be_iterated_is_refused_before_any_work(
    overrides: list[str], message: str, model: Path, tmp_path: Path
) -> None:
    tiny.refused_before_any_work(tiny.workplace(tmp_path, config(model)), RUN, overrides, message)
