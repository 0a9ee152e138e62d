"""OP-k's data set against what it must be: samples of the weights of then, scored and shaped as by hand."""

from __future__ import annotations

import json
import logging
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.models import path_check
from rrhf.models.adapters import AdapterSettings
from rrhf.models.load import ModelSettings, load_policy
from rrhf.models.passes import response_logprobs
from rrhf.models.tokenization import TextFormat
from rrhf.records.duplicates import merge_duplicates
from rrhf.records.files import read_records
from rrhf.records.record import DRAWN_TOKENS, Record
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.logprob import LogprobModel, fill_sums, reference_sums_name
from rrhf.sampling.sampler import Sampler, sample
from rrhf.sampling.settings import SamplingSettings
from rrhf.training.batching import MicroBatchSampler, Steps, StepSampler
from rrhf.training.callbacks import Stopped
from rrhf.training.config import RRHFConfig
from rrhf.training.folder import CHECKSUMS, last_checkpoint
from rrhf.training.online import Online, OnlineRecords
from rrhf.training.stage import train_model
from rrhf.training.trainer import RRHFTrainer
from support import tiny
from support.models import tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(policy="top-p", num_responses=3, max_new_tokens=5, batch_size=4, seed=2)
K, BETA, TARGET = 2, 0.05, 4.0


def vowels(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None if "z" in text else sum(letter in "aeiou" for letter in text) / 4 for text in completions]


def config(folder: Path, **options: Any) -> RRHFConfig:
    return RRHFConfig(
        output_dir=str(folder), bf16=False, report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2, learning_rate=1e-2,
        max_length=64, warmup_steps=0, **{"resample_steps": K, **options},
    )  # fmt: skip


def trainer(model: str, args: RRHFConfig, data: Any) -> RRHFTrainer:
    policy, tokenizer = load_policy(ModelSettings(model, device="cpu", dtype="float32"), training=True)
    return RRHFTrainer(model=policy, args=args, train_dataset=data, processing_class=tokenizer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_model(tmp_path_factory.mktemp("policy") / "model"))


@pytest.fixture(scope="module")
def trained(model: str, tmp_path_factory: pytest.TempPathFactory) -> RRHFTrainer:
    """10 queries, 4 a step: 6 steps in windows of 2, of which the second spans two epochs; a checkpoint at each."""
    folder = tmp_path_factory.mktemp("trained")
    context = RewardContext(device="cpu", dtype="float32", reference_model=model)
    online = Online(SAMPLING, [vowels], context=context, kl_beta=BETA)
    records = OnlineRecords(tiny.rows(10, responses=1, scores=False), online)
    args = config(folder, kl_target=TARGET, save_steps=K)
    made = trainer(model, args, records)
    made.train()
    return made


def window(made: RRHFTrainer, number: int) -> tuple[list[Record], dict[str, Any]]:
    folder = Path(str(made.args.output_dir)) / "windows"
    return list(read_records(folder / f"{number}.jsonl")), json.loads((folder / f"{number}.json").read_text())


def policy_of(made: RRHFTrainer, number: int, model: str) -> str:
    """The weights that the window was sampled from."""
    return str(Path(str(made.args.output_dir)) / f"checkpoint-{number * K}") if number else model


@pytest.mark.parametrize("number", range(3))
def test_the_samples_are_those_of_the_weights_of_then(number: int, trained: RRHFTrainer, model: str) -> None:
    records, _ = window(trained, number)
    steps = Steps(10, 2, 2, seed=trained.args.seed)
    rows = tiny.rows(10, responses=1, scores=False)
    planned = [(step, rows[i]["id"]) for step in range(number * K, number * K + K) for i in steps.step(step)]
    assert [record.id for record in records] == [f"{name}@{step}" for step, name in planned]
    asked = [replace(record.keeping([0]), scores=[], rewards={}) for record in records]
    policy, tokenizer = load_policy(ModelSettings(policy_of(trained, number, model), device="cpu", dtype="float32"))
    drawn = [merge_duplicates(record)[0] for record in sample(asked, policy, tokenizer, SAMPLING)]
    assert [record.responses for record in drawn] == [record.responses for record in records]


@pytest.mark.parametrize("number", range(3))
def test_scores_are_shaped_by_the_policy_of_then_and_the_first_one(
    number: int, trained: RRHFTrainer, model: str
) -> None:
    records, note = window(trained, number)
    beta = note["kl_beta"]
    sums = []
    for name in (policy_of(trained, number, model), model):
        settings = ModelSettings(name, device="cpu", dtype="float32")
        plain = [replace(record, rewards={}) for record in records]
        column = reference_sums_name(name)
        sums.append([r.rewards[column] for r in fill_sums(plain, column, LogprobModel(settings))])
    ratios = [[pi - rho for pi, rho in zip(*row, strict=True)] for row in zip(*sums, strict=True)]
    for record, row in zip(records, ratios, strict=True):
        rewards = vowels([], record.responses)
        wanted = [None if r is None else r - beta * ratio for r, ratio in zip(rewards, row, strict=True)]
        assert record.scores == pytest.approx(wanted, abs=1e-4)
    sampled = [r for rec, row in zip(records, ratios) for tag, r in zip(rec.sources, row) if "top-p" in tag]
    assert note["kl"] == pytest.approx(sum(sampled) / len(sampled), abs=1e-4)
    assert (abs(note["kl"]) < 1e-4) == (number == 0)


def test_beta_is_adapted_an_update_a_step(trained: RRHFTrainer) -> None:
    notes = [window(trained, number)[1] for number in range(3)]
    assert notes[0]["kl_beta"] == BETA
    for before, after in pairwise(notes):
        error = min(max(before["kl"] / TARGET - 1, -0.2), 0.2)
        assert after["kl_beta"] == pytest.approx(before["kl_beta"] * (1 + 0.1 * error) ** K)
    logged = {line["step"]: line for line in trained.state.log_history if "kl" in line}
    assert [logged[step]["kl_beta"] for step in (1, 3, 5)] == [note["kl_beta"] for note in notes]


def test_losses_over_tokens_read_the_policy_that_sampled(model: str, tmp_path: Path) -> None:
    context = RewardContext(device="cpu", dtype="float32", reference_model=model)
    args = config(tmp_path, ranking_loss="grpo", token_kl=0.5, save_steps=K)
    made = trainer(model, args, OnlineRecords(tiny.rows(4, responses=0), Online(SAMPLING, [vowels], context=context)))
    made.train()
    log = [line for line in made.state.log_history if "rank_loss" in line]
    # π = π_old at the first step, whose advantages sum to 0, and π = ρ; at the second π has moved away from both.
    assert abs(log[0]["rank_loss"]) < 1e-5 < abs(log[1]["rank_loss"]) and log[0]["grad_norm"] > 0
    records, _ = window(made, 0)
    policy, tokenizer = load_policy(ModelSettings(model, device="cpu", dtype="float32"))
    encoded = [TextFormat(tokenizer).encode_record(record, 64) for record in records]
    wanted = response_logprobs(policy, encoded).token_logprobs
    for column in ("old_token_logprobs", "reference_token_logprobs"):
        found = [value for record in records for row in record.extra[column] for value in row]
        assert found == pytest.approx(wanted.tolist(), abs=1e-5), column
    # The tokens are those that were drawn, which their texts need not become again, and equal responses stay apart.
    sampled = [r.keeping(range(r.sources.index("top-p/0"), len(r.responses))) for r in records]
    asked = [replace(record.without_responses(), extra={}) for record in records]
    sampler = Sampler(policy, tokenizer, SAMPLING)
    drawn = {i: [one.drawn for one in found] for i, _, found in sampler.respond_in_tokens(asked)}
    assert [record.extra[DRAWN_TOKENS] for record in sampled] == [drawn[i] for i in range(len(records))]
    assert [list(row.responses) for row in encoded] == [drawn[i] for i in range(len(records))]
    plain = [TextFormat(tokenizer).encode_record(replace(record, extra={}), 64) for record in records]
    assert [row.responses for row in plain] != [row.responses for row in encoded]
    with pytest.raises(UserError, match="give --reference_model"):
        args = config(tmp_path / "dpo", ranking_loss="dpo")
        trainer(model, args, OnlineRecords(tiny.rows(4), Online(SAMPLING, [vowels])))


def test_the_reference_is_prepared_once_for_all_blocks(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its forward would be wrapped once more a block, until Python's stack ends."""
    made = trainer(model, config(tmp_path), OnlineRecords(tiny.rows(4), Online(SAMPLING, [vowels])))
    reference, _ = load_policy(ModelSettings(model, device="cpu", dtype="float32"))
    checked: list[int] = []
    plain = path_check.usable_path
    monkeypatch.setattr(path_check, "usable_path", lambda *a: checked.append(1) or plain(*a))
    records = [Record(query="a b", responses=["c", "d e"])]
    filled = made.with_token_logprobs(records, "of", under=reference)
    forward = reference.forward
    assert made.with_token_logprobs(records, "of", under=reference) == filled
    assert reference.forward == forward
    assert len(checked) == 1


def test_a_baseline_is_over_equal_responses_too(model: str, tmp_path: Path) -> None:
    """Of one token to draw from all are equal: three of a query for GRPO, and one of them for a ranking."""
    online = Online(replace(SAMPLING, top_k=1), [vowels])
    for loss, count in (("grpo", 3), ("hinge", 1)):
        args = config(tmp_path / loss, ranking_loss=loss)
        made = trainer(model, args, OnlineRecords(tiny.rows(4, responses=0), online))
        made.train()
        records, _ = window(made, 0)
        assert {len(record.responses) for record in records} == {count}
        assert all(len(set(record.responses)) == 1 for record in records)


def test_a_window_trains_as_its_records_do_offline(model: str, tmp_path: Path) -> None:
    """The same steps on the same records offline, in the order of the windows, come to the same weights."""
    import torch

    online = Online(SAMPLING, [vowels])
    ours = trainer(model, config(tmp_path / "a"), OnlineRecords(tiny.rows(4), online))
    ours.train()
    rows = [row for number in range(1) for row in tiny.read_rows(tmp_path / f"a/windows/{number}.jsonl")]
    assert ours.state.global_step == 2 and len(rows) == 8
    args = replace(config(tmp_path / "b"), resample_steps=0, num_train_epochs=1)
    theirs = trainer(model, args, rows)
    theirs.get_train_dataloader = (
        lambda: [  # type: ignore[method-assign]
            theirs.train_dataset.records[i : i + 2] for i in range(0, 8, 2)
        ]
    )
    theirs.train()
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(weight, theirs.model.state_dict()[name]), name


@pytest.mark.parametrize(("sampled", "loss"), [(True, "hinge"), (False, "hinge"), (False, "dpo")])
def test_queries_that_keep_no_response_are_counted(
    sampled: bool,
    loss: str,
    model: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A query whose provided responses are all empty is left out, as in every stage, and no longer in silence.

    DPO's training reads a copy of the data with the reference's sums, which has lost them.
    """
    monkeypatch.setattr(logging.getLogger("rrhf"), "propagate", True)
    caplog.set_level("INFO", "rrhf")
    rows = tiny.rows(6, responses=2, scores=not sampled)
    rows[1]["responses"], rows[4]["responses"], rows[5]["responses"][0] = ["", " "], ["", ""], ""
    tiny.write_rows(tmp_path / "queries.jsonl", rows)
    online = Online(SAMPLING, [vowels], context=RewardContext(device="cpu", dtype="float32"))
    settings = ModelSettings(model, device="cpu", dtype="float32")
    args = config(tmp_path / "out", max_steps=1, resample_steps=K if sampled else 0, ranking_loss=loss)
    data, asked = tmp_path / "queries.jsonl", online if sampled else None
    summary = train_model(data, settings, args, AdapterSettings(), online=asked)
    assert "; 5 empty response dropped; 2 no response left" in caplog.text
    assert summary["records"] == 4 and summary["skipped"] == {"no response left": 2}


@pytest.mark.parametrize("steps", [2, 3])  # of a window: the second begins within an epoch, or with one
def test_a_signal_within_a_window_keeps_the_steps_before_it(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command then comes to the weights of an undisturbed one, dropout included."""
    tokenizer = tiny_tokenizer()
    dropping = tiny_model("gpt2", len(tokenizer))
    assert dropping.config.resid_pdrop == 0.1
    dropping.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.write_rows(tmp_path / "queries.jsonl", tiny.rows(10, responses=0))
    settings = ModelSettings(str(tmp_path / "model"), device="cpu", dtype="float32")
    plain = OnlineRecords._sample

    def train(output: str, signal_at: int | None = None) -> None:
        def sampled(self: OnlineRecords, block: list[Record], done: Any) -> Any:
            if self.trainer.state.global_step == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(self, block, done)

        monkeypatch.setattr(OnlineRecords, "_sample", sampled)
        args = replace(config(tmp_path / output), resample_steps=steps)
        online = Online(SAMPLING, [vowels], context=RewardContext(device="cpu", dtype="float32"))
        train_model(tmp_path / "queries.jsonl", settings, args, AdapterSettings(), online=online)

    train("whole")
    with pytest.raises(Stopped) as stopped:
        train("stopped", signal_at=steps)
    assert stopped.value.code == 143
    checkpoint = tmp_path / "stopped" / f"checkpoint-{steps}"
    assert last_checkpoint(checkpoint.parent) == str(checkpoint) and (checkpoint / CHECKSUMS).exists()
    sealed = (checkpoint / CHECKSUMS).stat().st_mtime_ns
    with pytest.raises(Stopped):
        train("stopped", signal_at=steps)
    assert (checkpoint / CHECKSUMS).stat().st_mtime_ns == sealed  # it stands there
    with pytest.raises(Stopped):
        train("none", signal_at=0)
    assert last_checkpoint(tmp_path / "none") is None  # nothing was trained
    train("stopped")
    weights = [(tmp_path / output / "model.safetensors").read_bytes() for output in ("whole", "stopped")]
    assert weights[0] == weights[1]
    losses = [json.loads((tmp_path / o / "training.json").read_text())["train_loss"] for o in ("whole", "stopped")]
    assert losses[0] == losses[1]


def test_a_data_set_that_samples_and_the_setting_belong_together(model: str, tmp_path: Path) -> None:
    args = config(tmp_path)
    with pytest.raises(UserError, match="must be OnlineRecords"):
        trainer(model, args, tiny.rows(3))
    args.resample_steps = 0
    with pytest.raises(UserError, match="every --resample_steps steps"):
        trainer(model, args, OnlineRecords(tiny.rows(3), Online(SAMPLING, [vowels])))
    with pytest.raises(UserError, match="needs --reference_model"):
        Online(SAMPLING, [vowels], kl_beta=0.1)
    with pytest.raises(UserError, match="adapts --kl_beta"):
        args = config(tmp_path, kl_target=1.0)
        trainer(model, args, OnlineRecords(tiny.rows(3), Online(SAMPLING, [vowels])))
    with pytest.raises(UserError, match="no data to normalise over"):
        Online(SAMPLING, [vowels], reward_normalisation=["data"])


@pytest.mark.parametrize("loss", [{"ranking_loss": "dpo"}, {"ranking_loss": "grpo", "token_kl": 0.5}])
def test_a_reference_with_other_tokens_is_refused(loss: dict[str, Any], model: str, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other")
    tiny_tokenizer(eos="<|im_end|>").save_pretrained(other)
    context = RewardContext(device="cpu", dtype="float32", reference_model=str(other))
    records = OnlineRecords(tiny.rows(3), Online(SAMPLING, [vowels], context=context))
    with pytest.raises(UserError, match=r"--reference_model .*other: its tokenizer is not that of the model"):
        trainer(model, config(tmp_path / "out", **loss), records)


@pytest.mark.parametrize(("count", "per_device", "accumulation", "world"), [(10, 2, 2, 1), (9, 1, 4, 2), (4, 3, 1, 1)])
def test_the_steps_are_those_of_a_data_set_that_is_there(
    count: int, per_device: int, accumulation: int, world: int
) -> None:
    steps = Steps(count, per_device, accumulation, world, seed=5)
    names = MicroBatchSampler(steps)
    samplers = [
        StepSampler([1] * count, per_device, accumulation, world=world, rank=rank, seed=5) for rank in range(world)
    ]
    for epoch in range(2):
        for sampler in (names, *samplers):
            sampler.set_epoch(epoch)
        planned = list(names)
        assert len(planned) == len(names) == len(samplers[0])
        batches = [list(sampler) for sampler in samplers]
        for place, ((number, batch),) in enumerate(planned):
            assert batch < steps.micro_batches(number)
            assert {i for of_rank in batches for i in of_rank[place]} <= set(steps.step(number))
        every = sorted(i for number in {name[0] for (name,) in planned} for i in steps.step(number))
        assert every == list(range(count))
