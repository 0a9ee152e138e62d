"""`rrhf score` killed and run again: the same file, and nothing that was paid for or took long is asked for again."""

from __future__ import annotations

import gc
import shutil
import signal
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.common.journal import Journal
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.rewards import logprob, scoring
from rrhf.rewards.kind import Item, RewardContext, RewardKind, Scorer
from rrhf.rewards.logprob import LogprobModel, fill_sums
from rrhf.rewards.stage import RewardSettings, ScoringSettings, score_file
from support import tiny
from support.logprobs import records

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL_PARTS = tiny.put("rrhf.rewards.stage:SCORING_PART", 4)


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(rho: Path, pi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, responses, a reward, and what scoring them gives when nothing stops it."""
    folder = tmp_path_factory.mktemp("scored")
    for model in (rho, pi):
        shutil.copytree(model, folder / model.name)
    tiny.write_rewards(folder)
    write_records(folder / "data.jsonl", records())
    tiny.warm(*command("whole.jsonl"), cwd=folder, faults=[SMALL_PARTS]).done()
    return folder


def command(output: str) -> list[str]:
    """A function, a policy's log-probability, KL shaping and a normalisation: five steps, and one at the end."""
    return [
        "score", "--data", "data.jsonl", "--output", output, "--reward", "tiny_rewards:vowels", "logprob:pi",
        "--reward_normalisation", "query", "data", "--model", "pi", "--reference_model", "rho", "--kl_beta", "0.1",
        "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("output", "at", "call"),
    [
        ("part.jsonl", "rrhf.records.parts_folder:PartsFolder._write", 3),
        ("forward.jsonl", "rrhf.models.passes:response_logprobs", 4),
        ("moment.jsonl", "rrhf.rewards.combination:normalised", 6),
    ],
)
def test_killed_at_any_step_it_gives_the_same_file(place: Path, output: str, at: str, call: int) -> None:
    killed = 0
    while (result := tiny.warm(*command(output), cwd=place, faults=[SMALL_PARTS, tiny.die(at, call)])).code:
        assert result.code == -signal.SIGKILL, result.err
        killed += 1
        if killed == 3:  # what is made last is begun anew each time, and would die for ever
            tiny.warm(*command(output), cwd=place, faults=[SMALL_PARTS]).done()
            break
    assert killed
    assert (place / output).read_bytes() == (place / "whole.jsonl").read_bytes()
    assert not (place / f"{output}.parts").exists()


def test_other_weights_do_not_go_on_with_what_these_began(place: Path, pi: Path) -> None:
    fault = tiny.die("rrhf.records.parts_folder:PartsFolder._write", 2)
    assert tiny.warm(*command("other.jsonl"), cwd=place, faults=[SMALL_PARTS, fault]).code == -signal.SIGKILL
    shutil.move(place / "rho", place / "kept")
    shutil.copytree(pi, place / "rho")
    try:
        refused = tiny.warm(*command("other.jsonl"), cwd=place, faults=[SMALL_PARTS])
    finally:
        shutil.rmtree(place / "rho")
        shutil.move(place / "kept", place / "rho")
    assert refused.code == 2 and "log-probabilities was ['logprob-sum:rho#" in refused.err


# --- what is kept of a part that was not finished --------------------------------------------------------------------


def given(path: Path, count: int) -> Path:
    write_records(path, [Record(query=f"q{i}", responses=["a", "bb"], id=f"r{i}") for i in range(count)])
    return path


class Flaky:
    """A reward function that fails on one query, and notes what it is asked."""

    def __init__(self) -> None:
        self.record = ""
        self.asked: list[str] = []

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        if self.record in prompts:
            raise ValueError("no answer")
        self.asked += prompts
        return [float(len(completion)) for completion in completions]


flaky = Flaky()


def test_what_slow_calls_gave_is_kept_when_a_later_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, output, settings = (
        given(tmp_path / "data.jsonl", 200),
        tmp_path / "scored.jsonl",
        RewardSettings([f"{__name__}:flaky"]),
    )
    monkeypatch.setattr("rrhf.rewards.steps.SLOW", 0.0)
    flaky.record = "q150"
    with pytest.raises(UserError, match="failed on record r150"):
        score_file(data, output, settings)
    assert {f"q{i}" for i in range(128)} <= set(flaky.asked)
    flaky.record, flaky.asked = "", []
    score_file(data, output, settings)
    assert set(flaky.asked) == {f"q{i}" for i in range(128, 200)}
    assert [record.scores for record in read_records(output)] == [[1.0, 2.0]] * 200


def test_sums_of_slow_calls_are_kept_when_a_later_one_fails(
    rho: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = given(tmp_path / "data.jsonl", 160), tmp_path / "scored.jsonl"
    settings, scoring = RewardSettings(["provided"]), ScoringSettings(reference_model=str(rho), device="cpu")
    rows = [{"id": f"r{i}", "query": f"q{i}", "responses": ["a", "bb"], "scores": [0.0, 1.0]} for i in range(160)]
    tiny.write_rows(data, rows)
    asked: list[int] = []
    broken = {"q150"}

    def filled(batch: list[Record], name: str, model: LogprobModel) -> list[Record]:
        if broken & {str(record.query) for record in batch}:
            raise UserError("out of memory")
        asked.append(len(batch))
        return fill_sums(batch, name, model)

    monkeypatch.setattr("rrhf.rewards.steps.SLOW", 0.0)
    monkeypatch.setattr("rrhf.rewards.steps.fill_sums", filled)
    with pytest.raises(UserError, match="out of memory"):
        score_file(data, output, settings, scoring)
    broken.clear()
    score_file(data, output, settings, scoring)
    assert asked == [64, 64, 32]
    score_file(data, tmp_path / "at-once.jsonl", settings, scoring)
    assert list(read_records(output)) == list(read_records(tmp_path / "at-once.jsonl"))


def test_a_column_that_few_records_have_is_found_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrhf.rewards.stage.SCORING_PART", 2)
    rows = [{"id": f"r{i}", "query": "q", "responses": ["a"], **({"answer": "a"} if i == 3 else {})} for i in range(5)]
    tiny.write_rows(tmp_path / "data.jsonl", rows)
    score_file(tmp_path / "data.jsonl", tmp_path / "scored.jsonl", RewardSettings([f"{__name__}:right"]))
    assert [record.scores for record in read_records(tmp_path / "scored.jsonl")] == [[None]] * 3 + [[1.0]] + [[None]]
    tiny.write_rows(tmp_path / "bare.jsonl", [row for row in rows if "answer" not in row])
    with pytest.raises(UserError, match="asks for the column 'answer', which the records lack"):
        score_file(tmp_path / "bare.jsonl", tmp_path / "none.jsonl", RewardSettings([f"{__name__}:right"]))


def right(prompts: list[str], completions: list[str], answer: list[str | None]) -> list[float | None]:
    return [None if gold is None else float(gold == text) for gold, text in zip(answer, completions, strict=True)]


def test_a_reward_that_is_paid_for_keeps_its_answers_in_the_folder_of_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any kind with a journal, as judges have one: an answer is on disk as soon as it is there."""
    paid: list[str] = []
    broken: set[str] = {"q5"}

    def make(argument: str, context: RewardContext) -> Scorer:
        assert context.journals is not None
        journal = Journal(context.journals, argument)

        def scores(items: Sequence[Item]) -> list[float | None]:
            answered: dict[str, float] = {entry["query"]: entry["score"] for entry in journal.read()}
            for record, _ in items:
                if record.query not in answered:
                    if record.query in broken:
                        raise UserError("the server is down")
                    paid.append(str(record.query))
                    answered[str(record.query)] = float(len(paid))
                    journal.add({"query": record.query, "score": answered[str(record.query)]})
            return [answered[str(record.query)] for record, _ in items]

        return scores

    monkeypatch.setitem(scoring.REWARDS, "paid", RewardKind(("paid:X",), make, lambda argument, context: argument))
    data, output = given(tmp_path / "data.jsonl", 8), tmp_path / "scored.jsonl"
    with pytest.raises(UserError, match="the server is down"):
        score_file(data, output, RewardSettings(["paid:x"]))
    assert len(paid) == 5
    broken.clear()
    score_file(data, output, RewardSettings(["paid:x"]))
    assert paid == [f"q{i}" for i in range(8)]
    assert [record.scores[0] for record in read_records(output)] == [float(i + 1) for i in range(8)]


def test_one_model_at_a_time_is_in_memory(rho: Path, pi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    load = logprob.load_policy_or_adapter

    def watched(settings: Any) -> Any:
        gc.collect()
        assert not any(reference() for reference in alive)
        model, tokenizer = load(settings)
        alive.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(logprob, "load_policy_or_adapter", watched)
    data, output = tmp_path / "data.jsonl", tmp_path / "scored.jsonl"
    write_records(data, records())
    names = [f"logprob:{pi}", f"logprob:{rho}"]
    context = ScoringSettings(reference_model=str(rho), device="cpu", dtype="float32")
    score_file(data, output, RewardSettings(names), context)
    assert len(alive) == 3
    gc.collect()
    assert not any(reference() for reference in alive)
    for record in read_records(output):
        assert record.rewards[names[1]] == pytest.approx([0.0] * len(record.responses), abs=1e-5)  # ρ against itself
