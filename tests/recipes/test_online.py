"""OP-k on a tiny random model through the command line: killed inside windows, it ends as if undisturbed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from support import tiny
from support.tiny import count, die

RUN = ("run", "config.yaml", "--output", "run")
DECODE = "rrhf.sampling.decoding:decode"
STEP = "rrhf.training.trainer:RRHFTrainer.training_step"
RESULTS = [*(f"model/windows/{number}.jsonl" for number in range(3)), "model/model.safetensors", "evaluation.json"]


def config(model: Path) -> dict[str, Any]:
    """6 steps of 4 queries in windows of 2, over two epochs; the one checkpoint stands within the second window."""
    settings = tiny.config(model)
    settings["data"] = {"source": "data.jsonl", "limit": 12, "held_out_limit": 3}
    settings["sample"] |= {"batch_size": 1, "num_responses": 2, "max_new_tokens": 4}
    settings["train"] |= {"resample_steps": 2, "save_steps": 3}
    settings["evaluate"] |= {"reward": ["tiny_rewards:vowels"], "max_new_tokens": 4, "batch_size": 3}
    return settings


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.workplace(tmp_path_factory.mktemp("undisturbed"), config(model))
    tiny.warm(*RUN, cwd=folder).done()
    return folder / "run"


def test_killed_inside_windows_and_resumed(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path / "run", config(model))
    calls = tmp_path / "calls"
    # A window has 8 queries: 2 parts of 4, which are decoded one by one.
    for where, faults, drawn in (
        ("window 0, in its second part", [die(DECODE, 6)], 5),
        ("window 1, between its steps", [die(STEP, 4)], 4 + 8),
    ):
        killed = tiny.warm(*RUN, cwd=folder, faults=[count(DECODE, calls), *faults])
        assert killed.code == -signal.SIGKILL, (where, killed.err[-2000:])
        assert calls.read_text().count("\n") == drawn, where
        calls.unlink()
    assert (folder / "run/model/checkpoint-3/trainer_state.json").exists()

    lost = shutil.copytree(folder, tmp_path / "lost")
    (lost / "run/model/windows/1.jsonl").unlink()
    refused = tiny.warm(*RUN, cwd=lost)
    assert refused.code == 2 and "within window 1, whose samples cannot be used" in refused.err

    tiny.warm(*RUN, cwd=folder, faults=[count(DECODE, calls)]).done()
    assert calls.read_text().count("\n") == 8 + 2  # window 2, and one batch of each model's evaluation
    different = [name for name in RESULTS if (folder / "run" / name).read_bytes() != (undisturbed / name).read_bytes()]
    assert not different


def test_sampling_is_not_counted_as_training_where_a_kill_came_between(model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path / "run", config(model))
    killed = tiny.warm(*RUN, cwd=folder, faults=[die("rrhf.recipes.run_folder:RunFolder.split_time", 1)])
    assert killed.code == -signal.SIGKILL and (folder / "run/model/training.json").exists()
    timings = folder / "run/timings.json"
    assert "sample" not in json.loads(timings.read_text())
    tiny.warm(*RUN, cwd=folder).done()
    first = json.loads(timings.read_text())
    assert first["sample"] > 0
    tiny.warm(*RUN, cwd=folder).done()
    assert json.loads(timings.read_text())["train"] == first["train"], "taken off once"


def test_a_signal_within_a_window_keeps_its_parts(model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, config(model))
    stopped = tiny.warm(*RUN, cwd=folder, faults=[die(DECODE, 6, "TERM")])
    assert stopped.code == 143 and "Traceback" not in stopped.err
    assert [path.name for path in (folder / "run/model/windows/0.jsonl.parts").glob("step-0-part-*")] == [
        "step-0-part-0000000.jsonl"
    ]


@pytest.mark.parametrize("without", [0, 4])
def test_queries_may_lack_the_responses_that_others_bring(without: int, model: Path, tmp_path: Path) -> None:
    """The first, which had spoken for all, as well as a later one, which was refused."""
    rows = [row for row in tiny.rows(12) if row["id"] not in ("q9", "q10", "q11")]
    held_out = tiny.rows(12)[9:]
    rows[without] = {"id": rows[without]["id"], "query": rows[without]["query"], "topic": "topic 0"}
    folder = tiny.workplace(tmp_path, config(model), [*held_out, *rows])
    tiny.warm(*RUN, "train.max_steps=2", "evaluate.ranked_samples=0", cwd=folder).done()
    provided = {row["id"]: row.get("responses", []) for row in rows}
    assert {row["id"]: len(row.get("scores", [])) for row in tiny.read_rows(folder / "run/scored.jsonl")} == {
        name: len(responses) for name, responses in provided.items()
    }
    for row in tiny.read_rows(folder / "run/model/windows/0.jsonl"):
        brought = provided[row["id"].rpartition("@")[0]]
        assert row["responses"][: len(brought)] == brought and len(row["scores"]) > len(brought)


def test_what_a_run_leaves(undisturbed: Path) -> None:
    windows = [tiny.read_rows(undisturbed / f"model/windows/{number}.jsonl") for number in range(3)]
    steps = [row["id"].rpartition("@")[2] for rows in windows for row in rows]
    assert steps == [str(step) for step in range(6) for _ in range(4)]
    for rows in windows:
        for row in rows:
            assert row["sources"][:2] == ["human/0", "human/1"] and 2 < len(row["sources"]) <= 4
            assert row["scores"] == row["rewards"]["tiny_rewards:vowels"] and None not in row["scores"]
    log = json.loads((undisturbed / "model/trainer_state.json").read_text())["log_history"]
    for line in (line for line in log if "loss" in line):
        shares = [line[f"{what}_share"] for what in ("sampling", "scoring", "training")]
        assert sum(shares) == pytest.approx(1, abs=1e-3) and "sample_reward_mean" in line
        assert (shares[0] > 0) == (line["step"] in (1, 3, 5))
    timings = json.loads((undisturbed / "timings.json").read_text())
    assert timings["sample"] > 0 and timings["train"] > 0
    assert json.loads((undisturbed / "model/training.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sample=null"], "nothing is sampled"),
        (["sample.source=[http://localhost:1/v1@chat:2]"], "cannot be given those of the policy in training"),
        (["score.reward=[provided]"], "cannot score new texts"),
        (["train.resample_steps=-1"], "--resample_steps -1: must be at least 0"),
        (
            ["score.kl_beta=0.1", "train.ranking_loss=dpo", "train.reference_model=other"],
            "train.reference_model other and score.reference_model ",
        ),
    ],
)
def test_what_cannot_be_sampled_online_is_refused(
    overrides: list[str], message: str, model: Path, tmp_path: Path
) -> None:
    tiny.refused_before_any_work(tiny.workplace(tmp_path, config(model)), RUN, overrides, message)


def test_the_training_command_samples_too(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    """``rrhf train --resample_steps`` on the run's records, with its settings, comes to its model."""
    settings = config(model)
    tiny.write_rewards(tmp_path)
    flags = {**settings["train"], **settings["sample"], "seed": 3, "reward": "tiny_rewards:vowels"}
    result = tiny.warm(
        "train", "--model", str(model), "--device", "cpu", "--dtype", "float32", "--output", "model",
        "--data", str(undisturbed / "scored.jsonl"), *(f"--{name}={value}" for name, value in flags.items()),
        cwd=tmp_path,
    )  # fmt: skip
    result.done()
    for name in RESULTS[:4]:
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_flags_of_sampling_alone_are_refused(tmp_path: Path) -> None:
    result = tiny.warm("train", "--model", "m", "--data", "d", "--output", "o", "--top-p", "0.5", cwd=tmp_path)
    assert result.code == 2 and "--top_p is for responses that are sampled while training" in result.err
