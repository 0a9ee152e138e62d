"""The whole pipeline on a tiny random model through the command line: killed anywhere, it ends as if undisturbed."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.common.presentation import typeset_number
from rrhf.common.yaml_text import load_yaml
from rrhf.models.identity import model_digest
from rrhf.recipes import offline
from rrhf.recipes.config import DataSettings, parse_config
from rrhf.recipes.data import write_queries
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.files import read_records
from support import tiny
from support.ports import free_port
from support.tiny import Result, count, die, put

RUN = ("run", "config.yaml", "--output", "run")
RESULTS = (
    "queries.jsonl", "held_out.jsonl", "responses.jsonl", "scored.jsonl", "model/model.safetensors", "evaluation.json",
    "evaluation.rho.jsonl", "evaluation.pi.jsonl", "evaluation.generations.jsonl",
)  # fmt: skip
SMALL_PARTS = put("rrhf.rewards.stage:SCORING_PART", 8)  # 3 parts of the 20 records

DECODE = "rrhf.sampling.decoding:decode"
STEP = "rrhf.training.trainer:RRHFTrainer.training_step"


def command(*arguments: str, cwd: Path, faults: Any = ()) -> Result:
    """A command in a process of its own; the long form starts every one from nothing."""
    return (tiny.cold if tiny.LONG else tiny.warm)(*arguments, cwd=cwd, faults=faults)


@pytest.fixture(scope="session")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped, started from a shell as a user would."""
    folder = tiny.workplace(tmp_path_factory.mktemp("undisturbed"), tiny.config(model))
    tiny.cold(*RUN, cwd=folder).done()
    return folder


PAID = """
import os
from tiny_rewards import spaces

def judge(prompts, completions, **columns):
    with open("paid", "a") as file:
        file.write(os.environ["RANK"])
    return spaces(prompts, completions)
"""


def test_several_processes_measure_and_count_their_time_once(model: Path, tmp_path: Path) -> None:
    """A judge in the evaluation is paid once; seconds are those of the clock."""
    settings = tiny.config(model)
    settings["evaluate"]["reward"] = ["paid:judge"]
    folder = tiny.workplace(tmp_path / "work", settings)
    (folder / "paid.py").write_text(PAID)
    forks, began = tiny.forks(*tiny.PRELOADED), time.monotonic()
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        forks.start("rrhf.cli.main:main", list(RUN), cwd=folder, env={**shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    first, second = [forks.wait(process).done() for process in started]
    assert "2 process(es)" in first.err and "report: run/report.html" in first.out and second.out == ""
    assert set((folder / "paid").read_text()) == {"0"}
    evaluation, timings = (
        json.loads((folder / "run" / name).read_text()) for name in ("evaluation.json", "timings.json")
    )
    assert evaluation["pi"]["n"] == 9 and evaluation["ranking"]["pi"]["n"] > 0
    assert sum(timings.values()) <= time.monotonic() - began and (folder / "run/report.html").exists()


def test_only_the_first_process_counts_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, counted in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        with run.timed("train"):
            pass
        run.split_time("train", {"sample": 1.0})
        assert run.timings.exists() == counted


def test_a_run_says_how_it_orders_its_samples_and_on_what_it_ran(undisturbed: Path) -> None:
    run = undisturbed / "run"
    ranking = json.loads((run / "evaluation.json").read_text())["ranking"]
    rows = tiny.read_rows(run / "evaluation.pairs.jsonl")
    assert (ranking["file"], ranking["of"], ranking["pi"]["n"]) == ("scored.jsonl", len(rows), len(rows))
    for model in ("rho", "pi"):
        shares = []
        for row in rows:
            r, p = row["scores"], row["rewards"][f"logprob {model}"]
            pairs = [(p[i], p[j]) for i in range(len(r)) for j in range(len(r)) if r[i] > r[j]]
            shares.append(sum(better > worse for better, worse in pairs) / len(pairs))
        assert ranking[model]["accuracy"]["mean"] == pytest.approx(sum(shares) / len(shares))
    assert ranking["gain"]["mean"] > 0, "after training more pairs stand the right way round"
    (environment,) = json.loads((run / "environment.json").read_text())["environments"]
    assert environment["stages"] == ["data", "sample", "score", "train", "evaluate"]
    numbers = json.loads((run / "evaluation.json").read_text())["pi"]
    assert numbers["perplexity_interval"]["low"] < numbers["perplexity"] < numbers["perplexity_interval"]["high"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Most violated pair" in page and environment["versions"]["torch"] in page


def assert_same(folder: Path, other: Path, names: tuple[str, ...] = RESULTS) -> None:
    different = [name for name in names if (folder / "run" / name).read_bytes() != (other / "run" / name).read_bytes()]
    assert not different


def left_over(folder: Path) -> list[str]:
    """What only an unfinished run may have."""
    found = folder.rglob("*")
    return [str(p) for p in found if p.suffix in (".parts", ".tmp") or p.name.startswith("checkpoint-")]


# --- killed ----------------------------------------------------------------------------------------------------------


KILLS = {
    "data, in the middle of the queries": [die("rrhf.records.files:record_line", 5)],
    "data, before the held-out prompts": [die("rrhf.recipes.data:write_records", 2)],
    "sample, in the second part": [die(DECODE, 6)],
    "sample, before clearing up": [die("shutil:rmtree", 1)],
    "score, in the second part": [die("tiny_rewards:vowels", 2), SMALL_PARTS],
    "train, between two checkpoints": [die(STEP, 6)],
    "train, in the middle of a checkpoint": [die("rrhf.training.trainer:RRHFTrainer._save_optimizer_and_scheduler", 1)],
    "train, before the summary": [die("rrhf.training.stage:write_text", 1)],
    "evaluate, responses of π": [die(DECODE, 9 + 6)],
    "evaluate, rewards": [die("tiny_rewards:spaces", 2)],
    "evaluate, before the file that says it is complete": [die("rrhf.evaluation.stage:write_text", 2)],
    "report": [die("rrhf.report:write_report", 1)],
}


def test_killed_once_in_each_stage_and_resumed(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    for where, faults in KILLS.items():
        killed = command(*RUN, cwd=folder, faults=faults)
        assert killed.code == -signal.SIGKILL, (where, killed.err[-2000:])
    command(*RUN, cwd=folder).done()
    assert_same(folder, undisturbed)
    assert not left_over(folder)
    for name, ids in (("scored", range(9, 29)), ("held_out", range(9))):
        assert [row["id"] for row in tiny.read_rows(folder / f"run/{name}.jsonl")] == [f"q{i}" for i in ids]
    log = json.loads((folder / "run/model/trainer_state.json").read_text())["log_history"]
    assert Counter(line["step"] for line in log if "loss" in line) == Counter(range(1, 11))


def test_a_resumed_stage_does_not_repeat_what_is_done(model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    assert command(*RUN, cwd=folder, faults=[die(DECODE, 6)]).code == -signal.SIGKILL
    calls = tmp_path / "calls"
    faults = [count(DECODE, calls), count("tiny_rewards:vowels", calls), die(STEP, 6), SMALL_PARTS]
    assert command(*RUN, cwd=folder, faults=faults).code == -signal.SIGKILL
    # Of 10 batches the first part's 4 are not drawn again; 3 parts are scored.
    assert Counter(calls.read_text().split()) == {DECODE: 6, "tiny_rewards:vowels": 3}
    calls.unlink()
    command(*RUN, cwd=folder, faults=[count(DECODE, calls), count(STEP, calls)]).done()
    # From the checkpoint of step 4 to step 10; 9 held-out prompts of each model, one at a time.
    assert Counter(calls.read_text().split()) == {STEP: 6, DECODE: 18}


def test_a_damaged_last_checkpoint_is_not_gone_on_from(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    fault = die("transformers.trainer:TrainerState.save_to_json", 2)  # all of checkpoint-4 is there but this
    assert command(*RUN, cwd=folder, faults=[fault]).code == -signal.SIGKILL
    assert (folder / "run/model/checkpoint-4/model.safetensors").exists()
    calls = tmp_path / "calls"
    command(*RUN, cwd=folder, faults=[count(STEP, calls)]).done()
    assert len(calls.read_text().split()) == 8  # from step 2
    assert_same(folder, undisturbed)


@pytest.mark.parametrize(("how", "code"), [("INT", 130), ("TERM", 143)])
def test_a_signal_during_training_keeps_every_step(
    how: str, code: int, undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    stopped = command(*RUN, cwd=folder, faults=[die(STEP, 5, how)])
    assert stopped.code == code
    assert "Traceback" not in stopped.err and "same command" in stopped.err
    assert (folder / "run/model/checkpoint-5/trainer_state.json").exists()
    assert not (folder / "run/model/training.json").exists()
    calls = tmp_path / "calls"
    command(*RUN, cwd=folder, faults=[count(STEP, calls)]).done()
    assert len(calls.read_text().split()) == 5
    assert_same(folder, undisturbed)


@pytest.mark.parametrize(("how", "code"), [("INT", 130), ("TERM", 143)])
def test_a_signal_during_sampling_keeps_the_parts(how: str, code: int, model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    stopped = command(*RUN, cwd=folder, faults=[die(DECODE, 10, how)])
    assert stopped.code == code
    assert "Traceback" not in stopped.err and "same command" in stopped.err
    assert sorted(p.name for p in (folder / "run/responses.jsonl.parts").glob("part-*")) == [
        "part-0000000.jsonl",
        "part-0000001.jsonl",
    ]


# --- complete --------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(undisturbed: Path) -> None:
    run = undisturbed / "run"
    queries, responses, scored = (tiny.read_rows(run / f"{name}.jsonl") for name in ("queries", "responses", "scored"))
    assert [row["id"] for row in queries] == [f"q{i}" for i in range(9, 29)]
    for before, drawn, after in zip(queries, responses, scored, strict=True):
        assert drawn["responses"][:2] == before["responses"] and drawn["topic"] == before["topic"]
        assert drawn["sources"] == ["human/0", "human/1", "top-p/0", "top-p/1", "top-p/2"]
        assert after["responses"] == drawn["responses"]
        assert after["scores"] == after["rewards"]["tiny_rewards:vowels"] and len(after["scores"]) == 5
    assert not left_over(undisturbed)
    assert set(json.loads((run / "timings.json").read_text())) == {
        "data", "sample", "score", "train", "evaluate", "report"
    }  # fmt: skip
    log = (run / "log.txt").read_text()
    for words in (
        "data: 20 queries to train on, 9 held out",
        "sample: begins",
        "train: 20 records",
        "evaluate: begins",
    ):
        assert words in log
    assert (run / "config.yaml").exists()


def test_the_trained_model_loads_and_differs(undisturbed: Path, model: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    before = load_file(model / "model.safetensors")
    trained = AutoModelForCausalLM.from_pretrained(undisturbed / "run/model").state_dict()
    assert trained.keys() >= before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in before)


def test_the_report_and_the_terminal_show_the_numbers(undisturbed: Path) -> None:
    run = undisturbed / "run"
    evaluation = json.loads((run / "evaluation.json").read_text())
    page = (run / "report.html").read_text(encoding="utf-8")
    for name in ("rho", "pi"):
        assert typeset_number(evaluation[name]["reward_mean"]) in page
        assert evaluation[name]["n"] == 9
    assert typeset_number(evaluation["reward_gain"]["mean"]) in page
    assert evaluation["reward_gain"]["mean"] == pytest.approx(
        evaluation["pi"]["reward_mean"] - evaluation["rho"]["reward_mean"]
    )


def test_run_again_after_the_end_nothing_is_redone(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    command(*RUN, cwd=folder).done()
    before = {name: (folder / "run" / name).stat().st_mtime_ns for name in RESULTS}
    calls = tmp_path / "calls"
    names = [DECODE, STEP, "tiny_rewards:vowels", "rrhf.models.load:load_policy"]
    again = command(*RUN, cwd=folder, faults=[count(name, calls) for name in names]).done()
    assert {name: (folder / "run" / name).stat().st_mtime_ns for name in RESULTS} == before
    assert not calls.exists()
    result = json.loads((folder / "run/evaluation.json").read_text())
    assert f"{result['reward_gain']['mean']:.3f}" in again.out and "reward vowels" in again.out
    assert "minutes: " in again.out and "ρ before" in again.out and "run/report.html" in again.out
    assert_same(folder, undisturbed)


def test_a_changed_configuration_is_refused(undisturbed: Path) -> None:
    result = command(*RUN, "train.learning_rate=0.5", "sample.top_p=0.9", cwd=undisturbed)
    assert result.code == 2
    assert "train.learning_rate was 0.001, is 0.5" in result.err and "sample.top_p was None, is 0.9" in result.err
    assert "Traceback" not in result.err and "--output" in result.err


def test_a_configuration_of_which_nothing_came_binds_nobody(model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    refused = command(*RUN, "evaluate.max_new_tokens=128", cwd=folder)
    assert refused.code == 2 and (folder / "run/config.yaml").exists()
    assert command(*RUN, "train.seed=9", cwd=folder, faults=[die(STEP, 1)]).code == -signal.SIGKILL
    other = command(*RUN, cwd=folder)
    assert other.code == 2 and "holds a run of another configuration (train.seed was 9, is " in other.err


@pytest.mark.parametrize("left", ["queries.jsonl", "held_out.jsonl", "responses.jsonl.parts", "model", "rounds"])
def test_what_a_stage_left_binds_to_its_configuration(left: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.remember_config({"seed": 1})
    run.remember_config({"seed": 2})
    (tmp_path / left).mkdir()
    run.remember_config({"seed": 2})
    with pytest.raises(UserError, match=r"another configuration \(seed was 2, is 1\)"):
        run.remember_config({"seed": 1})


MADE_OF = {
    "data.jsonl": "held_out.jsonl", "run/queries.jsonl": "responses.jsonl", "run/responses.jsonl": "scored.jsonl",
    "run/scored.jsonl": "model", "run/held_out.jsonl": "evaluation.json", "run/model/config.json": "evaluation.json",
}  # fmt: skip


@pytest.mark.parametrize("changed", MADE_OF)
def test_a_result_that_was_made_of_something_else_is_refused(changed: str, undisturbed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    assert command(*RUN, cwd=folder).code == 0  # a copy is taken up
    text = (folder / changed).read_text(encoding="utf-8")
    (folder / changed).write_text(text.replace(" ", "  ", 1), encoding="utf-8")
    result = command(*RUN, cwd=folder)
    assert result.code == 2 and "Traceback" not in result.err
    name = "model" if "model" in changed else Path(changed).name
    assert f"run/{MADE_OF[changed]} was made before {name} changed" in result.err and "--output" in result.err
    (folder / changed).write_text(text, encoding="utf-8")
    assert command(*RUN, cwd=folder).code == 0


def test_what_changes_no_result_may_change(undisturbed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    (folder / "data.jsonl").rename(folder / "elsewhere.jsonl")  # its records are in the run
    free = [
        "train.max_tokens_per_forward=512",
        "train.logging_steps=7",
        "sample.max_requests=5",
        "score.max_requests=5",
        "evaluate.timeout=20",
        "max_tokens=9000",
        "train.alarm_length=9",
        "train.watch_prompts=3",
    ]
    result = command(*RUN, *free, cwd=folder).done()
    assert "evaluate: evaluation.json is complete" in result.err
    assert "max_tokens_per_forward: 512" in (folder / "run/config.yaml").read_text(encoding="utf-8")
    result = command(*RUN, *free, "evaluate.max_tokens_per_forward=512", cwd=folder)  # more than `max_tokens`
    assert result.code == 2 and "evaluate.max_tokens_per_forward was None, is 512" in result.err


def test_a_result_of_a_reward_that_was_edited_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    rewards = folder / "tiny_rewards.py"
    code = rewards.read_text(encoding="utf-8")
    signature = "def vowels(prompts, completions, **columns):"
    rewards.write_text(code.replace(signature, f"{signature}\n    # another one", 1), encoding="utf-8")
    assert code != rewards.read_text(encoding="utf-8")
    result = command(*RUN, cwd=folder)
    assert result.code == 2 and "run/scored.jsonl was made before the code of tiny_rewards:vowels changed" in result.err


OWN = """from rrhf.losses import ranking_loss
from rrhf.sampling.policies import Draws

def make(*how):
    return Draws(*how)

def loss(record, settings):
    return ranking_loss("hinge")(record, settings)
"""


def test_a_result_of_a_policy_or_a_loss_that_was_edited_is_refused(model: Path, tmp_path: Path) -> None:
    config = tiny.config(model)
    config["data"] |= {"limit": 4, "held_out_limit": 2}
    config["sample"]["policy"], config["train"]["ranking_loss"] = "own:make", "own:loss"
    config["train"]["max_steps"] = 1
    folder = tiny.workplace(tmp_path, config)
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    command(*RUN, cwd=folder).done()
    edits = {"run/responses.jsonl": ("make", "(*how):"), "run/model": ("loss", "(record, settings):")}
    for result, (name, signature) in edits.items():
        (folder / "own.py").write_text(OWN.replace(signature, f"{signature}  # another"), encoding="utf-8")
        refused = command(*RUN, cwd=folder)
        assert refused.code == 2 and f"{result} was made before the code of own:{name} changed" in refused.err


def test_another_reference_is_another_training(model: Path, tmp_path: Path) -> None:
    config = tiny.config(model)
    config["train"] |= {"ranking_loss": "dpo", "reference_model": str(model)}
    inputs = offline._trained(parse_config(config, tmp_path / "model"))
    assert inputs == {f"the reference {model}": model_digest(str(model))}
    config["train"]["ranking_loss"] = "hinge"  # which reads none
    assert not offline._trained(parse_config(config, tmp_path / "model"))


def test_lost_queries_are_made_again(undisturbed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    before = (folder / "run/queries.jsonl").read_bytes()
    (folder / "run/queries.jsonl").unlink()
    command(*RUN, cwd=folder).done()
    assert (folder / "run/queries.jsonl").read_bytes() == before


def test_an_input_that_is_not_known_now_is_no_other_input(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.remember_inputs("train", run.model, {"hub/name": "commit"}, kept=False)
    run.remember_inputs("train", run.model, {"hub/name": ""}, kept=True)  # no network
    with pytest.raises(UserError, match="before hub/name changed"):
        run.remember_inputs("train", run.model, {"hub/name": "another"}, kept=True)
    run.remember_inputs("train", run.model, {"hub/name": "another"}, kept=False)  # begun anew
    run.remember_inputs("train", run.model, {"hub/name": "another"}, kept=True)


def test_a_runs_own_files_move_with_its_folder(tmp_path: Path) -> None:
    def made_of(run: RunFolder, digest: str, kept: bool) -> None:
        last = run.round(2)
        last.remember_inputs("train", last.model, {str(run.round(1).model): digest}, kept=kept)

    made_of(RunFolder(tmp_path / "here"), "x", kept=False)
    (tmp_path / "here").rename(tmp_path / "there")
    made_of(RunFolder(tmp_path / "there"), "x", kept=True)
    with pytest.raises(UserError, match="was made before rounds/1/model changed"):
        made_of(RunFolder(tmp_path / "there"), "y", kept=True)


def test_checkpoints_of_other_data_are_not_gone_on_from(model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    assert command(*RUN, cwd=folder, faults=[die(STEP, 6)]).code == -signal.SIGKILL
    scored = folder / "run/scored.jsonl"
    scored.write_text("".join(scored.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    result = command(*RUN, cwd=folder)
    assert result.code == 2 and "run/model was made before scored.jsonl changed" in result.err


def test_what_would_end_the_evaluation_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    result = command(*RUN, "evaluate.max_new_tokens=128", cwd=folder)
    assert result.code == 2 and "--max_new_tokens 128 do not fit the context of 128 tokens" in result.err
    assert not (folder / "run/queries.jsonl").exists()


def test_of_a_model_that_cannot_be_loaded_the_key_that_names_it_is_told(model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    (folder / "broken").mkdir()
    (folder / "broken/config.json").write_text('{"model_type": "no-such-model"}')
    (folder / "broken/model.safetensors").write_bytes(b"never read")
    policy = command(*RUN, "model=broken", cwd=folder)
    assert policy.code == 2 and "--model broken: cannot be loaded" in policy.err and "perplexity" not in policy.err
    judge = command(*RUN[:-1], "other", "evaluate.perplexity_model=broken", cwd=folder)
    assert judge.code == 2 and "perplexity model broken (evaluate.perplexity_model, " in judge.err


@pytest.mark.parametrize("override", ["train.resample_steps=0", "iterations=2", "--dry_run"])
def test_a_loss_over_tokens_without_their_probabilities_is_refused_before_any_work(
    override: str, model: Path, tmp_path: Path
) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    message = "train.ranking_loss: grpo: it needs how likely each token was"
    tiny.refused_before_any_work(folder, RUN, ("train.ranking_loss=grpo", override), message)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_data:rows", "data source 'no_such_data:rows': no module 'no_such_data'"),
        ("tiny_rewards:vowel", "data source 'tiny_rewards:vowel': tiny_rewards has no 'vowel'"),
        (
            "tiny_rewards:__name__",
            "data source 'tiny_rewards:__name__' is str, not a function: name a function f(l",
        ),
    ],
)
def test_a_mistyped_data_source_is_not_called_a_reward(source: str, message: str, model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    result = command(*RUN, f"data.source={source}", cwd=folder)
    assert result.code == 2 and message in result.err
    assert "reward '" not in result.err and "f(prompts" not in result.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"data source 'own_data:fails' failed: ZeroDivisionError: .*in fails, "),
        ("ends", r"data source 'own_data:ends' failed: ZeroDivisionError: .*in ends, "),
        ("nothing", r"data source 'own_data:nothing' gave NoneType: it must be a function f\(limit, seed\)"),
    ],
)
def test_a_data_source_that_fails_is_named(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_data.py").write_text(
        "def fails(limit, seed):\n    return 1 / 0\n\n\n"
        "def ends(limit, seed):\n    yield {'query': 'q'}\n    yield 1 / 0\n\n\n"
        "def nothing(limit, seed):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        write_queries(DataSettings(f"own_data:{name}"), tmp_path / "queries.jsonl", tmp_path / "held_out.jsonl")


def test_a_query_that_a_data_source_repeats_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that a file repeats: it had the id of the first, which the next stage refused."""
    (tmp_path / "own_rows.py").write_text(
        "def twice(limit, seed):\n    return [{'query': q} for q in ('h', 'h', 'a', 'b', 'a')]\n\n\n"
        "def bad(limit, seed):\n    return [{'query': 'h'}, {'text': 'a'}]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    queries, held_out = tmp_path / "queries.jsonl", tmp_path / "held_out.jsonl"
    write_queries(DataSettings("own_rows:twice", held_out_limit=2), queries, held_out)
    for file, texts in ((queries, ["a", "b", "a"]), (held_out, ["h", "h"])):
        records = list(read_records(file))
        assert [record.query for record in records] == texts and len({record.id for record in records}) == len(texts)
    with pytest.raises(UserError, match=r"own_rows:bad, row 2: no query"):
        write_queries(DataSettings("own_rows:bad", held_out_limit=1), queries, held_out)


def test_queries_that_are_all_held_out_leave_no_file(tmp_path: Path) -> None:
    """An empty one made of the run one that had begun, whose configuration could not be mended."""
    data = tiny.write_rows(tmp_path / "data.jsonl", [{"query": "q"}, {"query": "q"}])
    queries = tmp_path / "queries.jsonl"
    with pytest.raises(UserError, match=r"every query of .* is held out"):
        write_queries(DataSettings(str(data), held_out_limit=1), queries, tmp_path / "held_out.jsonl")
    assert not queries.exists()


def test_sections_become_settings_by_name_and_all_faults_come_together(tmp_path: Path) -> None:
    values = {"model": "m", "seed": 5, "sample": {"source": ["m@greedy:1"], "concurrency": 2, "seed": 6},
              "score": {"reward": ["a:b"]}, "train": {"peft": "lora", "bf16": False, "max_query_length": 3},
              "evaluate": {"reward": ["c:d"], "max_new_tokens": 4}, "data": {"source": "s"}}  # fmt: skip
    config = parse_config(values, tmp_path / "model")
    assert (config.data.source, config.model.model, config.sources.source) == ("s", "m", ["m@greedy:1"])
    assert config.sample is not None and (config.sample.seed, config.remote.concurrency) == (6, 2)
    assert (config.train.seed, config.train.output_dir) == (5, str(tmp_path / "model"))
    assert (config.adapter.peft, config.score.reward, config.evaluate_rewards.reward) == ("lora", ["a:b"], ["c:d"])
    assert (config.evaluate_sampling.seed, config.evaluate_sampling.max_new_tokens) == (5, 4)
    unsampled = parse_config({**values, "sample": None}, tmp_path)
    assert unsampled.sample is None and unsampled.sources.source == []
    words = load_yaml("{alarm: off, save_strategy: no, bf16: off, use_cpu: yes}")  # YAML 1.1 calls all four booleans
    config = parse_config({**values, "train": words}, tmp_path)
    assert (config.watch.alarm, config.train.save_strategy) == ("off", "no")
    assert (config.train.bf16, config.train.use_cpu) == (False, True)
    assert load_yaml("[1e-4, 3E+2, -1e4, 1.5e-3, e5, 1e, 0x1e-4]") == [1e-4, 300.0, -1e4, 1.5e-3, "e5", "1e", "0x1e-4"]
    elsewhere = {"device": "cpu", "policy": "beam", "kl_beta": 0.1, "eval_data": "f"}
    wrong = {"modl": 1, "score": 3, "data": {"source": "s", "limits": 2}, "train": {"peft": "x", **elsewhere}}
    with pytest.raises(UserError) as raised:
        parse_config({**values, **wrong}, tmp_path)
    for fault in ("modl: unknown key: did you mean 'model'", "section score: must hold keys and values, not 3",
                  "data.limits: unknown key: did you mean 'limit'", "section train: --peft x",
                  "train.device: unknown key: write 'device' outside the sections",
                  "train.policy: unknown key: it is a key of another section: sample.policy, evaluate.policy",
                  "train.kl_beta: unknown key: it is a key of another section: score.kl_beta",
                  "(see `rrhf train --help`; docs/configuration.md says"):  # fmt: skip
        assert fault in str(raised.value)


def test_a_shared_key_goes_to_no_stage_that_refuses_it(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": "m", "num_responses": 2, "reward_weights": [1, 0.5], "data": {"source": "s"},
        "score": {"reward": ["a:b", "c:d"]}, "evaluate": {"reward": ["a:b", "c:d"]},
    }  # fmt: skip
    config = parse_config(values, tmp_path)
    assert config.sample is not None and config.sample.num_responses == 2 and config.score.reward_weights == [1, 0.5]
    assert config.evaluate_sampling.num_responses is None and not config.evaluate_rewards.reward_weights
    with pytest.raises(UserError, match=r"evaluate\.num_responses: unknown key: it is a key of .*: sample\.num_resp"):
        parse_config(values | {"evaluate": values["evaluate"] | {"num_responses": 2}}, tmp_path)


def test_the_folder_of_the_model_is_no_key(tmp_path: Path) -> None:
    values = {"model": "m", "data": {"source": "s"}, "score": {"reward": ["a:b"]}, "evaluate": {"reward": ["a:b"]}}
    for more, fault in (({"train": {"output_dir": "x"}}, "train.output_dir"), ({"output_dir": "x"}, "output_dir")):
        with pytest.raises(UserError, match=rf"{fault}: unknown key"):
            parse_config(values | more, tmp_path / "model")
    assert parse_config(values, tmp_path / "model").train.output_dir == str(tmp_path / "model")


def test_changed_settings_of_an_unfinished_stage_are_refused(model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model))
    sample = ("sample", "--model", str(model), "--data", "data.jsonl", "--output", "out.jsonl", "--batch_size", "2")
    sample = (*sample, "--max_new_tokens", "4", "--device", "cpu", "--dtype", "float32")
    assert command(*sample, cwd=folder, faults=[die(DECODE, 6)]).code == -signal.SIGKILL
    refused = command(*sample, "--seed", "8", cwd=folder)
    assert refused.code == 2 and "seed was 0, is 8" in refused.err and "Traceback" not in refused.err
    assert command(*sample, cwd=folder, faults=[die("shutil:rmtree", 1)]).code == -signal.SIGKILL
    command(*sample, cwd=folder).done()
    assert not left_over(folder)
    assert command(*sample, cwd=folder).code == 2
    assert [row["id"] for row in tiny.read_rows(folder / "out.jsonl")] == [f"q{i}" for i in range(29)]


# --- kinds of runs ---------------------------------------------------------------------------------------------------


def test_without_sampling_only_provided_responses_are_ranked(model: Path, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path, tiny.config(model) | {"sample": None, "score": {"reward": ["provided"]}})
    command(*RUN, cwd=folder).done()
    scored = tiny.read_rows(folder / "run/scored.jsonl")
    assert {tuple(row["sources"]) for row in scored} == {("human/0", "human/1")}
    assert [row["scores"] for row in scored] == [row["scores"] for row in tiny.rows(29)[9:]]


def test_provided_responses_can_be_left_out(model: Path, tmp_path: Path) -> None:
    settings = tiny.config(model)
    settings["data"]["provided"] = False
    settings["sample"] = {"policy": "diverse-beam", "num_beams": 3, "max_new_tokens": 4, "batch_size": 4}
    folder = tiny.workplace(tmp_path, settings)
    command(*RUN, cwd=folder).done()
    scored = tiny.read_rows(folder / "run/scored.jsonl")
    assert {tuple(row["sources"]) for row in scored} == {tuple(f"diverse-beam/{i}" for i in range(3))}
    assert len(scored) == 20


def test_messages(model: Path, tmp_path: Path) -> None:
    settings = tiny.config(model) | {"system_prompt": "Be brief."}
    folder = tiny.workplace(tmp_path, settings, tiny.rows(29, messages=True))
    command(*RUN, cwd=folder).done()
    row = tiny.read_rows(folder / "run/scored.jsonl")[0]
    assert row["query"] == [{"role": "user", "content": tiny.rows(10)[9]["query"]}]
    assert len(row["scores"]) == 5
    assert json.loads((folder / "run/evaluation.json").read_text())["pi"]["n"] == 9


def test_single_commands_over_parquet(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    """The stages one by one, with Parquet between them, come to what the run came to."""
    from rrhf.records.files import read_records
    from rrhf.records.record import record_to_row

    folder = tiny.workplace(tmp_path, tiny.config(model))
    (folder / "queries.jsonl").write_bytes((undisturbed / "run/queries.jsonl").read_bytes())
    model_flags = ("--model", str(model), "--device", "cpu", "--dtype", "float32")
    settings = tiny.config(model)
    drawing = flags(settings["sample"] | {"seed": 3})
    command(
        "sample", *model_flags, "--data", "queries.jsonl", "--output", "responses.parquet", *drawing, cwd=folder
    ).done()
    command(
        "score", "--data", "responses.parquet", "--reward", "tiny_rewards:vowels", "--output", "scored.parquet",
        cwd=folder,
    ).done()  # fmt: skip
    training = flags(settings["train"] | {"seed": 3})
    command("train", *model_flags, "--data", "scored.parquet", "--output", "model", *training, cwd=folder).done()
    for name in ("responses", "scored"):
        wanted = tiny.read_rows(undisturbed / f"run/{name}.jsonl")
        assert [record_to_row(record) for record in read_records(folder / f"{name}.parquet")] == wanted
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (undisturbed / "run" / weights).read_bytes()
    evaluating = flags({k: v for k, v in settings["evaluate"].items() if k != "reward"} | {"seed": 3})
    command(
        "evaluate", "--model", "model", "--reference_model", str(model), "--device", "cpu", "--dtype", "float32",
        "--data", str(undisturbed / "run/held_out.jsonl"), "--output", "evaluation.json",
        "--reward", *settings["evaluate"]["reward"], *evaluating, cwd=folder,
    ).done()  # fmt: skip
    found = json.loads((folder / "evaluation.json").read_text())
    wanted = json.loads((undisturbed / "run/evaluation.json").read_text())
    assert {name: found[name] for name in ("rho", "pi", "rewards", "reward_gain")} == {
        name: wanted[name] for name in ("rho", "pi", "rewards", "reward_gain")
    }


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def test_what_rewards_need_are_keys_of_the_score_section(model: Path, tmp_path: Path) -> None:
    values = tiny.config(model)
    values["score"] |= {"reference_model": "ρ", "kl_beta": 0.1, "reward_normalisation": ["query"], "concurrency": 2}
    config = parse_config({**values, "seed": 3, "dtype": "float32"}, tmp_path)
    assert (config.scoring.model, config.scoring.reference_model, config.scoring.kl_beta) == (str(model), "ρ", 0.1)
    assert (config.scoring.seed, config.scoring.dtype, config.score_remote.concurrency) == (3, "float32", 2)
    assert config.scoring.reward_normalisation == ["query"] and config.evaluate_remote.concurrency != 2
    wrong = {**values, "score": {**values["score"], "kl_bta": 1}}
    with pytest.raises(UserError, match=r"score\.kl_bta: unknown key.*kl_beta"):
        parse_config(wrong, tmp_path)
