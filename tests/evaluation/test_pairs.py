"""Accuracy as a reward model: verdicts worked out by hand, RewardBench's rows, and `rrhf evaluate --pairs`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from oracles.logprobs import response_sum
from rrhf.cli.evaluate import main
from rrhf.common.errors import UserError
from rrhf.evaluation.pairs import Violation, accuracies, most_violated, verdict
from rrhf.models.load import ModelSettings, load_policy
from rrhf.models.tokenization import TextFormat
from rrhf.records.formats import load_dataset_records
from rrhf.records.record import Record
from support import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("preferred", "scores", "expected"),
    [
        ([1, 0], [0.2, 0.1], (1.0, 1.0, 1.0, 0)),
        ([1, 0], [0.1, 0.2], (0.0, 0.0, 0.0, 0)),
        ([1, 0], [0.1 + 0.2, 0.3], (0.5, 0.5, 0.0, 1)),  # equal but for the last bit: a tie
        ([1, 0, 0, 0], [3, 1, 2, 4], (2 / 3, 0.0, 0.0, 0)),  # best of four: second
        ([1, 0, 0, 0], [3, 3, 2, 1], (2.5 / 3, 0.5, 0.0, 1)),  # drawn at the top
        ([1, 1, 0], [3, 1, 2], (0.5, 1.0, 0.0, 0)),  # one right answer above, one below
        ([1, 1, 0], [3, 2, 1], (1.0, 1.0, 1.0, 0)),
        ([3, 2, 1], [1, 2, 3], (0.0, 0.0, 0.0, 0)),
        ([1, 0, None], [1, 2, 0], (0.0, 0.0, 0.0, 0)),
        ([1, 0, 0], [1, 2, None], (0.0, 0.0, 0.0, 0)),
        ([1, 0], [1, None], None),
        ([1, 1], [1, 2], None),
        ([1.0, 0.0], [None, None], None),
    ],
)
def test_what_scores_make_of_a_record(
    preferred: list[float | None], scores: list[float | None], expected: tuple[float, ...] | None
) -> None:
    found = verdict(preferred, scores)
    assert (found and (found.pairs, found.best, found.every, found.ties)) == expected


@pytest.mark.parametrize(
    ("scores", "logprobs", "expected"),
    [
        ([1, 0], [-1.0, -3.0], Violation(0, 1, -2.0, 0, 1)),  # none is violated: the nearest to it
        ([1, 0, 0.5], [-3.0, -1.0, -2.5], Violation(0, 1, 2.0, 3, 3)),
        ([0.1 + 0.2, 0.3, 0], [-9.0, -1.0, -2.0], Violation(0, 2, 7.0, 1, 2)),  # equal scores are no pair
        ([1, None, 0], [-2.0, -1.0, None], None),
        ([0.5, 0.5], [-2.0, -1.0], None),
    ],
)
def test_the_most_violated_pair(
    scores: list[float | None], logprobs: list[float | None], expected: Violation | None
) -> None:
    assert most_violated(scores, logprobs) == expected


def test_subsets_and_the_gain_of_pi() -> None:
    records = [
        Record(
            query=f"q{i}", responses=["a", "b"], scores=[1.0, 0.0], extra={"subset": "even" if i % 2 == 0 else "odd"}
        )
        for i in range(10)
    ]
    judges = {
        "rho": lambda record: [float(record.extra["subset"] == "even"), 0.5],  # right in the even ones
        "pi": lambda record: [1.0, 0.5] if record.query != "q9" else [0.0, 0.5],
        "silent": lambda record: [None, 1.0],
    }
    found = accuracies(records, judges, seed=0)
    assert found["rho"]["accuracy"]["mean"] == 0.5
    assert found["rho"]["accuracy"]["low"] < 0.5 < found["rho"]["accuracy"]["high"]
    assert {name: block["accuracy"]["mean"] for name, block in found["rho"]["subsets"].items()} == {"even": 1, "odd": 0}
    assert found["pi"]["subsets"]["odd"]["accuracy"]["mean"] == pytest.approx(0.8)
    assert found["gain"]["mean"] == pytest.approx(0.4)
    assert found["silent"] == {
        "n": 0, "unscored": 10, "subsets": {name: {"n": 0, "unscored": 5} for name in ("even", "odd")}
    }  # fmt: skip


# --- RewardBench -----------------------------------------------------------------------------------------------------

FIRST = {"prompt": "Why?", "chosen": "Yes", "rejected": "No", "chosen_model": "a", "rejected_model": "b",
         "subset": "refusals", "id": 7}  # fmt: skip
SECOND = {
    "id": "tied:3", "prompt": "Name a colour", "chosen": ["red", "blue"], "rejected": ["one", "two", "three"],
    "num_correct": 2, "models": ["a", "b", "c", "d", "e"], "subset": "Ties", "total_completions": 5,
}  # fmt: skip


def test_rewardbench_rows_are_read_and_guessed(tmp_path: Path) -> None:
    broken = {**FIRST, "id": 8, "chosen": []}
    tiny.write_rows(tmp_path / "bench.jsonl", [FIRST, SECOND, broken])
    one, two = load_dataset_records(tmp_path / "bench.jsonl")
    assert one.query == [{"role": "user", "content": "Why?"}] and one.id == "7"
    assert (one.responses, one.scores, one.sources) == (["Yes", "No"], [1.0, 0.0], ["system/a", "system/b"])
    assert two.responses == ["red", "blue", "one", "two", "three"] and two.scores == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert two.extra == {"subset": "Ties", "num_correct": 2, "total_completions": 5}


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ρ, π and preferences in RewardBench's rows."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny.write_model(folder / "rho")
    shutil.copytree(folder / "rho", folder / "pi")
    model, _ = load_policy(ModelSettings(str(folder / "pi"), device="cpu", dtype="float32"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "pi")
    words = [row["responses"][0] for row in tiny.rows(9)]
    rows = [
        {**FIRST, "id": i, "prompt": f"{i}?", "chosen": words[i], "rejected": words[-1 - i], "subset": f"s{i % 2}"}
        for i in range(9)
        if words[i] != words[-1 - i]
    ]
    rows.append({**FIRST, "id": 99, "rejected": "Yes"})  # prefers nothing: both are the same
    tiny.write_rows(folder / "pairs.jsonl", rows)
    tiny.write_rewards(folder)
    return folder


def naive(folder: Path, name: str) -> list[list[tuple[float, int]]]:
    """(sum, length) of each pair's responses, from a row of its own."""
    model, tokenizer = load_policy(ModelSettings(str(folder / name), device="cpu", dtype="float32"))
    encoded = [TextFormat(tokenizer).encode_record(record) for record in load_dataset_records(folder / "pairs.jsonl")]
    with torch.no_grad():
        return [[(float(response_sum(model, e.query, r)), len(r)) for r in e.responses] for e in encoded]


def test_the_accuracy_of_both_policies_their_difference_and_a_reward(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    flags = [
        "--model",
        "pi",
        "--reference_model",
        "rho",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--pairs",
        "pairs.jsonl",
    ]
    main([*flags, "--reward", "tiny_rewards:vowels", "--output", "e.json"])
    found = json.loads((place / "e.json").read_text())["accuracy"]
    rho, pi = naive(place, "rho"), naive(place, "pi")
    expected = {
        "rho": [a[0] / a[1] > b[0] / b[1] for a, b in rho],
        "pi": [a[0] / a[1] > b[0] / b[1] for a, b in pi],
        "pi - rho": [a[0] - c[0] > b[0] - d[0] for (a, b), (c, d) in zip(pi, rho, strict=True)],
    }
    for judge, wins in expected.items():
        assert found[judge]["accuracy"]["mean"] == pytest.approx(sum(wins) / len(wins)), judge
        assert found[judge]["n"] == len(wins) == sum(block["n"] for block in found[judge]["subsets"].values())
    assert set(found["tiny_rewards:vowels"]["subsets"]) == {"s0", "s1"}
    assert found["gain"]["mean"] == pytest.approx((sum(expected["pi"]) - sum(expected["rho"])) / len(rho))
    page = capsys.readouterr().out
    assert "ρ before" in page and "vowels" in page and "95 % bootstrap intervals" in page
    with pytest.raises(UserError, match="--overwrite"):
        main([*flags, "--output", "e.json"])


def test_beside_the_usual_evaluation_it_stands_in_the_same_file(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    tiny.write_rows(place / "held_out.jsonl", tiny.rows(2, responses=0))
    flags = ["--model", "pi", "--device", "cpu", "--dtype", "float32", "--max_new_tokens", "3"]
    data = ["--pairs", "pairs.jsonl", "--data", "held_out.jsonl", "--reward", "tiny_rewards:vowels", "provided"]
    with pytest.raises(UserError, match="provided: reads scores that records bring"):
        main([*flags, *data, "--output", "both.json"])
    assert "judge" not in capsys.readouterr().out  # before the pairs were judged
    main([*flags, *data[:-1], "--output", "both.json"])
    found = json.loads((place / "both.json").read_text())
    assert found["pi"]["n"] == 2 and set(found["accuracy"]) == {"file", "pi", "tiny_rewards:vowels"}


def test_pairs_that_were_judged_are_not_judged_again_when_the_rest_is_stopped(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    tiny.write_rows(place / "held_out.jsonl", tiny.rows(2, responses=0))
    flags = [
        "--model",
        "pi",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--max_new_tokens",
        "3",
        "--output",
        "stopped.json",
    ]
    flags += ["--pairs", "pairs.jsonl", "--data", "held_out.jsonl", "--reward", "tiny_rewards:vowels"]
    with monkeypatch.context() as stopped:
        stopped.setattr("rrhf.cli.evaluate.evaluate_models", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(flags)
    judged = (place / "stopped.pairs.jsonl").stat().st_mtime_ns
    main(flags)
    assert (place / "stopped.pairs.jsonl").stat().st_mtime_ns == judged
    found = json.loads((place / "stopped.json").read_text())
    assert set(found["accuracy"]) == {"file", "pi", "tiny_rewards:vowels"} and found["pi"]["n"] == 2
    main([*flags, "--overwrite"])
    assert (place / "stopped.pairs.jsonl").stat().st_mtime_ns > judged
    assert json.loads((place / "stopped.json").read_text())["accuracy"] == found["accuracy"]
    judged = (place / "stopped.pairs.jsonl").stat().st_mtime_ns
    (place / "stopped.json").unlink()
    main(["--model", "rho", *flags[2:]])  # another π
    assert (place / "stopped.pairs.jsonl").stat().st_mtime_ns > judged


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--reward", "provided:helpfulness"], "reads scores that records bring"),
        (["--reward", "people:none.csv"], "none.csv"),
        (["--reward", "tiny_rewards:vowels", "--reward_weights", "2"], "--reward_weights"),
        (["--num_responses", "7"], "--num_responses 7"),
    ],
)
def test_what_pairs_would_ignore_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], words: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    with pytest.raises(UserError, match=words):
        main(["--model", "pi", "--device", "cpu", "--output", "none.json", "--pairs", "pairs.jsonl", *given])
    assert not (place / "none.pairs.jsonl").exists()


def test_data_without_preferences_and_no_data_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    tiny.write_rows(place / "unscored.jsonl", tiny.rows(3, scores=False))
    flags = ["--model", "pi", "--device", "cpu", "--output", "none.json"]
    with pytest.raises(UserError, match="no record prefers"):
        main([*flags, "--pairs", "unscored.jsonl"])
    with pytest.raises(UserError, match=r"--data FILE.*--pairs FILE"):
        main(flags)
    with pytest.raises(UserError, match="--data needs a reward"):
        main([*flags, "--data", "unscored.jsonl"])
