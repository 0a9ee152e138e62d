"""One arm of each kind on a tiny model through the command line: killed, resumed, shared by two processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from oracles.logprobs import response_sum
from rrhf.models.load import ModelSettings, load_policy
from rrhf.models.tokenization import TextFormat
from rrhf.records.files import read_records
from support import tiny
from support.tiny import die

ARMS = ("start", "best-of-2", "SFT", "RRHF-DP", "DPO", "IP-2", "OP", "PPO", "NLPO+KL")
COMMAND = ("reproduce", "imdb", "--scale", "tiny.yaml", "--arms", ",".join(ARMS), "--learning_rate", "1e-3")
STEP = "rrhf.training.trainer:RRHFTrainer.training_step"
UNEQUAL = {"seconds", "load", "peak_memory_bytes", "config", "commit"}  # of two computations of one result


def settings(model: Path) -> dict[str, Any]:
    """8 queries in 4 steps of 4, 3 held-out prompts, 2 for the learning rate."""
    found = tiny.config(model)
    del found["seed"]
    found["data"] = {"source": "data.jsonl", "limit": 8, "held_out_limit": 3}
    found["sample"] = {"max_new_tokens": 4, "batch_size": 8}
    found["train"] |= {"max_steps": 4, "save_strategy": "no"}
    found["evaluate"] |= {"max_new_tokens": 4, "batch_size": 4, "top_k": 5}
    ppo = {"rollout_queries": 4, "num_responses": 2, "ppo_epochs": 2}
    found["reproduce"] = {
        "learning_rates": [1e-3, 1e-2], "rate_queries": 2, "held_out_samples": 2,
        "resample_steps": 2, "ppo": ppo, "chosen": "human/0",
    }  # fmt: skip
    return found


def workplace(folder: Path, model: Path) -> Path:
    tiny.workplace(folder, {}, tiny.rows(14, scores=False))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings(model)))
    return folder


KILLS = {  # each in an arm of another kind
    "start": [die("rrhf.recipes.reproduce.measure:evaluation_numbers", 1)],
    "best-of-2, before its evaluation": [die("rrhf.recipes.baselines.best_of_n:_evaluate", 1)],
    "SFT": [die(STEP, 2)],
    "RRHF-DP, its samples shared": [die("rrhf.recipes.reproduce.run:_copy", 5)],
    "DPO": [die(STEP, 4 + 3)],
    "IP-2, in the second round": [die(STEP, 4 + 2 + 2)],
    "OP, in the second window": [die(STEP, 2 + 3)],
    "PPO": [die("rrhf.training.ppo:PPO.step", 2)],
    "NLPO": [die("rrhf.training.ppo:PPO.step", 3)],
}


def results(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (folder / "out/results").glob("*.json")]
    return {result["arm"]: {k: v for k, v in result.items() if k not in UNEQUAL} for result in found}


@pytest.fixture(scope="module")
def shared_out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table, brought to its end by two processes."""
    folder = workplace(tmp_path_factory.mktemp("two"), model)
    both = [tiny.forks(*tiny.PRELOADED).start("rrhf.cli.main:main", [*COMMAND, "--output", "out"], cwd=folder)
            for _ in range(2)]  # fmt: skip
    said = [tiny.forks(*tiny.PRELOADED).wait(process) for process in both]
    assert [process.code for process in said] == [0, 0], said[0].err[-3000:] + said[1].err[-3000:]
    (folder / "said.txt").write_text("".join(process.err for process in said))
    return folder


def test_killed_in_every_kind_of_arm_and_resumed(shared_out: Path, model: Path, tmp_path: Path) -> None:
    folder = workplace(tmp_path, model)
    for where, faults in KILLS.items():
        killed = tiny.warm(*COMMAND, "--output", "out", cwd=folder, faults=faults)
        assert killed.code == -signal.SIGKILL, (where, killed.err[-3000:])
        if where == "DPO":  # as a folder that is removed while its arm runs
            (folder / "out/arms/DPO/seed-0/rate-0.001/config.yaml").unlink()
    tiny.warm(*COMMAND, "--output", "out", cwd=folder).done()
    assert results(folder) == results(shared_out)


def test_rrhf_after_an_sft_of_its_own(model: Path, tmp_path: Path) -> None:
    folder = workplace(tmp_path, model)
    tiny.workplace(folder, {}, tiny.rows(14))  # with preferences, which p_i is held against
    command = (*COMMAND[:1], "hh", *COMMAND[2:4], *COMMAND[6:], "--arms", "RRHF-P,RRHF-P-after-SFT", "--output", "out")
    assert tiny.warm(*command, cwd=folder, faults=[die(STEP, 4 + 4 + 2)]).code == -signal.SIGKILL
    tiny.warm(*command, cwd=folder).done()
    found = results(folder)
    assert {name: result["steps"] for name, result in found.items()} == {"RRHF-P": 4, "RRHF-P-after-SFT": 8}
    read = {name: result["tokens_trained"] for name, result in found.items()}
    assert read["RRHF-P"] < read["RRHF-P-after-SFT"] < 2 * read["RRHF-P"]  # the SFT's one response of each query, too
    run = folder / "out/arms/RRHF-P-after-SFT/seed-0/rate-0.001"
    made_of = json.loads((run / "made-of.json").read_text())
    assert "sft/model" in made_of["train"] and "sft/model" not in made_of["evaluate"]  # ρ is still the first model
    fitted = tiny.read_rows(run / "sft/scored.jsonl")
    assert {len(row["responses"]) for row in fitted} == {1} and len(tiny.read_rows(run / "scored.jsonl")) == len(fitted)
    assert found["RRHF-P"]["proxy"]["start"] == found["RRHF-P-after-SFT"]["proxy"]["start"]
    held_out = tiny.read_rows(folder / "out/prompts/held_out.jsonl")
    judged = tiny.read_rows(folder / "out/shared/pairs.jsonl")
    assert [row["id"] for row in judged] == [row["id"] for row in held_out[::2]] and judged[0]["scores"]
    assert found["RRHF-P"]["accuracy"]["n"] == 3
    (kept,) = (folder / "out/results").glob("RRHF-P-seed-0-*.json")
    before = json.loads(kept.read_text())
    kept.unlink()
    tiny.warm(*command, cwd=folder).done()  # all of it but the result is there
    after = json.loads(kept.read_text())
    assert before["peak_memory_bytes"] > 1e8 and after["peak_memory_bytes"] is None  # another process trained it
    assert {**before, **dict.fromkeys(UNEQUAL)} == {**after, **dict.fromkeys(UNEQUAL)}


@pytest.mark.parametrize("apart", [False, True])
def test_prompts_and_seeds_that_are_set_aside(model: Path, tmp_path: Path, apart: bool) -> None:
    folder = workplace(tmp_path, model)
    tiny.workplace(folder, {}, [{**row, "id": f"p{i}", "query": f"Prompt {i}?"} for i, row in enumerate(tiny.rows(30))])
    (folder / "held.jsonl").write_text("".join(reversed((folder / "data.jsonl").read_text().splitlines(keepends=True))))
    command = (*COMMAND[:4], "--arms", "start", *(["data.held_out=held.jsonl"] if apart else []))
    tiny.warm(*command, "--output", "search", cwd=folder).done()
    tiny.warm(*command, "reproduce.set_aside=true", "--output", "confirm", cwd=folder).done()

    def queries(output: str, name: str) -> list[str]:
        return [row["query"] for row in tiny.read_rows(folder / output / "prompts" / f"{name}.jsonl")]

    for name in ("queries", "rates"):
        assert queries("search", name) == queries("confirm", name)
    seen = {query for name in ("queries", "rates", "held_out") for query in queries("search", name)}
    kept = queries("confirm", "held_out")
    assert len(set(kept)) == 3 and len(kept) == 6 and not seen & set(kept)
    assert [path.name for path in (folder / "confirm/results").iterdir()] == ["start-seed-1000.json"]
    refused = tiny.warm(*command, "--output", "confirm", cwd=folder)
    assert refused.code == 2 and "holds other prompts" in refused.err
    few = tiny.warm(*command, "reproduce.set_aside=true", "data.held_out_limit=14", "--output", "few", cwd=folder)
    assert few.code == 2 and "of 14 held-out records can be set aside" in few.err


def log_ratios_of(run: Path) -> list[float]:
    """Σ log π − log ρ of each text of π that the KL of an arm is estimated on, a row and a forward each."""
    records = list(read_records(run / "kl.jsonl"))
    rho = yaml.safe_load((run / "config.yaml").read_text())["model"]
    sums = []
    for folder in (str(run / "model"), rho):
        policy, tokenizer = load_policy(ModelSettings(folder, device="cpu", dtype="float32"))
        encoded = [TextFormat(tokenizer, None).encode_record(record) for record in records]
        sums.append([float(response_sum(policy, one.query, one.responses[0])) for one in encoded])
    return [pi - rho for pi, rho in zip(*sums, strict=True)]


def test_what_two_processes_leave(shared_out: Path) -> None:
    found = results(shared_out)
    assert set(found) == set(ARMS)
    begun = [line for line in (shared_out / "said.txt").read_text().splitlines() if ": seed 0" in line]
    assert len(begun) == len(ARMS)  # no arm by both
    for name, result in found.items():
        assert {"proxy", "gold", "kl", "perplexity", "length_mean", "distinct_2", "phrases"} <= set(result), name
        assert result["proxy"]["start"] == found["start"]["proxy"]["mean"]  # the same texts of ρ for all
    assert found["start"]["kl"]["mean"] == 0 and found["start"]["proxy"]["gain"]["mean"] == 0
    samples = tiny.read_rows(shared_out / "out/arms/best-of-2/seed-0/once/best-of-n/scored.jsonl")
    best = [max(row["scores"]) for row in samples]
    assert found["best-of-2"]["proxy"]["mean"] == pytest.approx(sum(best) / 6) and found["best-of-2"]["samples"] == 12
    texts = tiny.read_rows(shared_out / "out/arms/RRHF-DP/seed-0/rate-0.001/evaluation.generations.jsonl")
    assert [row["id"] for row in texts[1::2]] == [f"{row['id']}/1" for row in texts[::2]] and len(texts) == 6
    values = [[next(iter(row[f"{model}_rewards"].values())) for row in texts] for model in ("rho", "pi")]
    rho, pi = ([(a + b) / 2 for a, b in zip(of_model[::2], of_model[1::2], strict=True)] for of_model in values)
    dp = found["RRHF-DP"]
    assert (dp["n"], dp["held_out_samples"], dp["kl"]["n"]) == (3, 2, 3)
    assert dp["prompts"]["proxy"] == pytest.approx(pi, abs=1e-4) and len(set(values[1])) > 1
    assert dp["proxy"]["gain"]["mean"] == pytest.approx(sum(pi) / 3 - sum(rho) / 3) and dp["proxy"]["gain"]["n"] == 3
    with torch.no_grad():
        ratios = log_ratios_of(shared_out / "out/arms/RRHF-DP/seed-0/rate-0.001")
    assert dp["kl"]["mean"] == pytest.approx(sum(ratios) / len(ratios), abs=1e-3) and abs(dp["kl"]["mean"]) > 0.01
    least, most = min(gains := [b - a for a, b in zip(rho, pi, strict=True)]), max(gains)
    low, high = dp["proxy"]["gain"]["low"], dp["proxy"]["gain"]["high"]
    assert least <= low <= high <= most  # of three means, not of six texts
    trained = [result for result in found.values() if result["learning_rate"]]
    assert {result["steps"] for result in trained} == {4} and all(result["rate_reward"] >= 0 for result in trained)
    assert found["PPO"]["models_resident"] >= 2 and found["RRHF-DP"]["models_resident"] == 1
    page = (shared_out / "out/report.md").read_text()
    assert all(f"| {arm} | " in page for arm in ARMS) and "(plots/" in page
