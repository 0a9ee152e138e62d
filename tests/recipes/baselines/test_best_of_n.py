"""rrhf baseline best-of-n on a tiny random model: what it keeps and says, killed and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from rrhf.evaluation.best_of_n import kl_bound, values_of_best
from rrhf.recipes.run_folder import RunFolder
from support import tiny
from support.judge_replies import judging, prompts_to
from support.tiny import die

DECODE = "rrhf.sampling.decoding:decode"
RESULTS = ("responses.jsonl", "scored.jsonl", "gold.jsonl", "best.jsonl", "evaluation.json")


def command(model: Path) -> tuple[str, ...]:
    return (
        "baseline", "best-of-n", "--model", str(model), "--device", "cpu", "--dtype", "float32", "--data", "data.jsonl",
        "--output", "best", "--policy", "top-p", "--num_responses", "4", "--max_new_tokens", "5", "--batch_size", "1",
        "--reward", "tiny_rewards:vowels", "--gold_reward", "tiny_rewards:spaces", "--seed", "5",
    )  # fmt: skip


def workplace(folder: Path) -> Path:
    folder.mkdir()
    tiny.write_rewards(folder)
    tiny.write_rows(folder / "data.jsonl", tiny.rows(8))
    return folder


def test_the_best_is_kept_and_measured_killed_or_not(model: Path, tmp_path: Path) -> None:
    done, killed = workplace(tmp_path / "done"), workplace(tmp_path / "killed")
    said = tiny.warm(*command(model), cwd=done).done().out
    for at, call in ((DECODE, 6), ("tiny_rewards:spaces", 1), ("rrhf.recipes.baselines.best_of_n:evaluate_texts", 1)):
        assert tiny.warm(*command(model), cwd=killed, faults=[die(at, call)]).code == -signal.SIGKILL, at
    tiny.warm(*command(model), cwd=killed).done()
    for name in RESULTS:
        assert (done / "best" / name).read_bytes() == (killed / "best" / name).read_bytes(), name

    scored, gold, best = (tiny.read_rows(done / "best" / f"{name}.jsonl") for name in ("scored", "gold", "best"))
    result = json.loads((done / "best/evaluation.json").read_text())
    for row, kept in zip(scored, best, strict=True):
        assert len(row["responses"]) == 4
        assert kept["responses"] == [row["responses"][row["scores"].index(max(row["scores"]))]]
    for name, rows in (("tiny_rewards:vowels", scored), ("tiny_rewards:spaces", gold)):
        curve = result["best_of_n"][name]
        each = [values_of_best(row["scores"], other["rewards"][name]) for row, other in zip(scored, rows)]
        assert [line["mean"] for line in curve] == pytest.approx([sum(v) / 8 for v in zip(*each, strict=True)])
        assert [line["kl_bound"] for line in curve] == [kl_bound(n) for n in (1, 2, 3, 4)]
        assert result["rewards"][name]["pi"]["mean"] == pytest.approx(curve[-1]["mean"])
    maxima = [max(row["scores"]) for row in scored]
    assert result["rho"]["reward_mean"] < result["pi"]["reward_mean"] == pytest.approx(sum(maxima) / 8)
    assert "KL at most" in said and (done / "best/report.html").exists()

    other = tiny.warm(*command(model), "--num_responses", "3", cwd=done)
    assert other.code == 2 and "num_responses was 4, is 3" in other.err


def test_normalisations_are_of_the_rewards_that_choose(model: Path, tmp_path: Path) -> None:
    """One each of two was taken for one each of the gold rewards, which ended the command after all samples."""
    folder = workplace(tmp_path / "normalised")
    (folder / "more.py").write_text("def words(prompts, completions):\n"
                                    "    return [float(len(text.split())) for text in completions]\n")  # fmt: skip
    names = ("tiny_rewards:vowels", "more:words")
    two = ("--reward", *names, "--reward_normalisation", "query", "none", "--num_responses", "2")
    tiny.warm(*command(model), *two, cwd=folder).done()
    result = json.loads((folder / "best/evaluation.json").read_text())
    assert list(result["best_of_n"]) == ["score", *names, "tiny_rewards:spaces"]


def test_a_judge_is_asked_once_about_the_samples_of_a_query(model: Path, tmp_path: Path) -> None:
    """Not again, each by itself, about the first and the best of them."""
    pytest.importorskip("openai", reason="the extra `endpoint` is not installed")
    folder = workplace(tmp_path / "judged")
    with judging(folder) as server:
        tiny.warm(*command(model), "--reward", "judge:judge.yaml", cwd=folder).done()
        assert len(prompts_to(server)) == 8 and all("\nResponse 4:" in prompt for prompt in prompts_to(server))
    rows, result = (
        tiny.read_rows(folder / "best/scored.jsonl"),
        json.loads((folder / "best/evaluation.json").read_text()),
    )
    assert result["rho"]["reward_mean"] == sum(row["scores"][0] for row in rows) / 8
    assert result["pi"]["reward_mean"] == sum(max(row["scores"]) for row in rows) / 8


def test_a_second_command_in_the_folder_is_refused(model: Path, tmp_path: Path) -> None:
    folder = workplace(tmp_path / "taken")
    with RunFolder(folder / "best").alone():
        second = tiny.warm(*command(model), cwd=folder)
    assert second.code == 2 and "best: another run is in this folder: process" in second.err
    assert not list((folder / "best").iterdir())


def test_what_has_no_best_is_refused(model: Path, tmp_path: Path) -> None:
    folder = workplace(tmp_path / "refused")
    for flags, message in (
        (["--policy", "beam"], "beams are no independent samples"),
        (["--num_responses", "1"], "the best of how many"),
        (["--reward", "provided"], "reads scores that records bring"),
        (["--reward_weights", "1", "2"], "give one finite number each"),
        (["--reward_normalisation", "query", "none"], "give one, or one each"),
    ):
        result = tiny.warm(*command(model), *flags, cwd=folder)
        assert result.code == 2 and message in result.err and "Traceback" not in result.err
    assert not (folder / "best").exists()
