"""The trainer: its numbers against the naive oracle, its gradients against each other, resuming, several processes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.training_args import ParallelMode

from oracles import losses as oracle
from oracles.logprobs import all_sums, record_sums
from rrhf.common.errors import UserError
from rrhf.losses import LossSettings, rrhf_loss
from rrhf.models.attention import our_attention
from rrhf.models.batching import plan_forwards
from rrhf.models.path_check import usable_path
from rrhf.models.tokenization import EncodedRecord, TextFormat
from rrhf.records.record import Record
from rrhf.training import placement
from rrhf.training.config import RRHFConfig
from rrhf.training.dataset import EncodedRecords
from rrhf.training.master_weights import takes_masters
from rrhf.training.trainer import RRHFTrainer, _keep_sums_exact
from rrhf.training.two_pass import RandomState
from support.models import in_fp64, tiny_model, tiny_tokenizer, toy_records
from support.scripts import ddp_gradient, ddp_train, fsdp_pass
from support.training import Gradients, config

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer()
VOCABULARY = len(TOKENIZER)
TIMES = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def trainer_of(model: Any, folder: Path, records: Iterable[Any], **options: Any) -> RRHFTrainer:
    callbacks, peft_config = options.pop("callbacks", None), options.pop("peft_config", None)
    return RRHFTrainer(
        model=model, args=config(folder, **options), train_dataset=records, processing_class=TOKENIZER,
        callbacks=callbacks, peft_config=peft_config,
    )  # fmt: skip


def encode(records: Iterable[Record], max_length: int = 192) -> list[EncodedRecord]:
    format = TextFormat(TOKENIZER)
    return [format.encode_record(record, max_length) for record in records]


def naive_metrics(model: Any, records: Sequence[EncodedRecord], released: bool = False) -> dict[str, float]:
    """What a step over ``records`` should log, by loops over floats and one forward a response."""
    total = dict.fromkeys(("rank_loss", "sft_loss", "best_logprob", "violated_pairs"), 0.0)
    pairs = ordered = 0
    for record in records:
        with torch.no_grad():
            sums = record_sums(model, record).tolist()
        lengths = [len(response) for response in record.responses]
        p = oracle.logprobs(sums, lengths)
        _, rank, fit = oracle.rrhf(sums, lengths, record.scores)
        if released:
            width = len(record.query) + max(lengths)
            _, rank, fit = oracle.released(sums, width, record.scores)
            p = [value / width for value in sums]
        best = oracle.best(record.scores)
        assert best is not None
        total["rank_loss"] += rank / len(records)
        total["sft_loss"] += fit / len(records)
        total["best_logprob"] += p[best] / len(records)
        for i, j in oracle.pairs(record.scores):
            pairs += 1
            ordered += p[i] < p[j]
            total["violated_pairs"] += (p[i] > p[j]) / len(records)
    return {**total, "rank_accuracy": ordered / pairs}


def naive_gradients(
    model: Any, records: Sequence[EncodedRecord], settings: LossSettings
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over ``records`` and its gradients, one forward a response."""
    losses = []
    for record in records:
        lengths = torch.tensor([len(response) for response in record.responses])
        scores = torch.tensor([math.nan if s is None else s for s in record.scores], dtype=torch.float64)
        losses.append(rrhf_loss(record_sums(model, record), lengths, scores, settings).total)
    loss = torch.stack(losses).mean()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """The same names, and no entry further apart than ``tolerance`` times the largest entry of all."""
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    assert largest > 0
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) <= tolerance * largest, name


# --- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, path", [("llama", "tree"), ("gemma3", "tree"), ("bloom", "padded")])
@pytest.mark.parametrize("budget", [2048, 24])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.filterwarnings("ignore:BloomForCausalLM does not take")
def test_one_step_logs_the_naive_losses(family: str, path: str, budget: int, released: bool, tmp_path: Path) -> None:
    records = toy_records(6, seed=1)
    model = tiny_model(family, VOCABULARY)
    expected = naive_metrics(model, encode(records), released)
    assert 0 < expected["rank_accuracy"] < 1
    assert expected["rank_loss"] > 0
    trainer = trainer_of(
        model, tmp_path, records, learning_rate=0.0, max_steps=1, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, max_tokens_per_forward=budget, released_compat=released,
    )  # fmt: skip
    trainer.train()
    assert trainer.path == path
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, abs=1e-4), name
    assert line["loss"] == pytest.approx(expected["rank_loss"] + expected["sft_loss"], abs=1e-4)
    assert line["tokens_per_second"] > 0
    assert "router_loss" not in line


def padded_rows(model: Any, record: EncodedRecord) -> list[list[float]]:
    """Log-probabilities as the released code lays them out: a row of the longest one's width a response.

    A place holds the log-probability of the response token that comes next; all others, query and padding, hold 0.
    """
    rows = []
    width = len(record.query) + max(len(response) for response in record.responses)
    for response in record.responses:
        ids = [*record.query, *response]
        with torch.no_grad():
            found = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        row = [0.0] * width
        for place in range(len(record.query) - 1, len(ids) - 1):
            row[place] = float(found[place, ids[place + 1]])
        rows.append(row)
    return rows


@pytest.mark.parametrize("budget", [2048, 24])
def test_released_compat_gives_what_means_over_padded_rows_give(budget: int, tmp_path: Path) -> None:
    """PAPER: every p_i is divided by the padded length, and the cross-entropy is a mean over the padded row."""
    records = toy_records(4, seed=1, responses=(3, 5))
    model = tiny_model("llama", VOCABULARY)
    rank = fit = 0.0
    for record in encode(records):
        rows = padded_rows(model, record)
        p = [sum(row) / len(row) for row in rows]
        scores = [-math.inf if score is None else score for score in record.scores]
        for i, low in enumerate(record.scores):
            for j, high in enumerate(record.scores):
                if low is not None and high is not None and low < high and p[i] > p[j]:
                    rank += (p[i] - p[j]) / len(records)
        fit -= p[scores.index(max(scores))] / len(records)
    found = {}
    for released in (True, False):
        trainer = trainer_of(
            tiny_model("llama", VOCABULARY), tmp_path, records, learning_rate=0.0, max_steps=1,
            gradient_accumulation_steps=4, max_tokens_per_forward=budget, released_compat=released,
        )  # fmt: skip
        trainer.train()
        found[released] = trainer.state.log_history[0]
    assert found[True]["rank_loss"] == pytest.approx(rank, abs=1e-5)
    assert found[True]["sft_loss"] == pytest.approx(fit, abs=1e-5)
    assert found[True]["loss"] == pytest.approx(rank + fit, abs=1e-4)
    assert found[False]["sft_loss"] > 5 * fit and abs(found[False]["rank_loss"] - rank) > 0.05 * rank > 0


def test_means_over_the_steps_between_two_lines(tmp_path: Path) -> None:
    records = toy_records(8, seed=2)
    model = tiny_model("llama", VOCABULARY)
    expected = naive_metrics(model, encode(records))
    trainer = trainer_of(
        model, tmp_path, records, learning_rate=0.0, num_train_epochs=2, gradient_accumulation_steps=2, logging_steps=4
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "rank_loss" in line]
    assert len(lines) == 2
    for line in lines:  # an epoch each
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, abs=1e-4), name


def test_weights_and_ranking_losses_reach_the_step(tmp_path: Path) -> None:
    records = toy_records(4, seed=1, responses=(3, 4))
    chosen = {
        "ranking_loss": "margin", "margin": 0.3, "rank_weight": 3.0, "sft_weight": 0.5, "sft_reduction": "mean",
        "length_exponent": 0.5,
    }  # fmt: skip
    model = in_fp64(tiny_model("llama", VOCABULARY))
    loss, expected = naive_gradients(model, encode(records), LossSettings(**chosen))
    gradients = Gradients()
    trainer = trainer_of(
        model, tmp_path, records, learning_rate=0.0, max_steps=1, per_device_train_batch_size=4,
        gradient_accumulation_steps=1, callbacks=[gradients], **chosen,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert_close(gradients.found, expected, 1e-8)


def test_the_router_loss_is_part_of_the_loss(tmp_path: Path) -> None:
    lines, gradients = [], []
    for budget in (2048, 24):
        seen = Gradients()
        trainer = trainer_of(
            tiny_model("mixtral", VOCABULARY), tmp_path, toy_records(4, seed=1), learning_rate=0.0, max_steps=1,
            gradient_accumulation_steps=4, max_tokens_per_forward=budget, callbacks=[seen],
        )  # fmt: skip
        trainer.train()
        assert trainer.path == "tree"
        line = trainer.state.log_history[0]
        assert line["router_loss"] > 0.01
        assert line["loss"] == pytest.approx(line["rank_loss"] + line["sft_loss"] + line["router_loss"], abs=1e-4)
        lines.append(line)
        gradients.append(seen.found)
    assert lines[0]["rank_loss"] == pytest.approx(lines[1]["rank_loss"], abs=1e-4)
    # without it the routers would have another gradient
    plain = Gradients()
    model = tiny_model("mixtral", VOCABULARY)
    model.config.output_router_logits = False
    trainer_of(
        model, tmp_path, toy_records(4, seed=1), learning_rate=0.0, max_steps=1, gradient_accumulation_steps=4,
        callbacks=[plain],
    ).train()  # fmt: skip
    routers = [name for name in plain.found if name.endswith("mlp.gate.weight")]
    assert routers
    for name in routers:
        assert not torch.allclose(plain.found[name], gradients[0][name], atol=1e-4)


def test_evaluation_gives_the_naive_losses_and_disturbs_nothing(tmp_path: Path) -> None:
    held_out = toy_records(5, seed=9)
    for budget in (2048, 24):
        model = tiny_model("gpt2", VOCABULARY)  # with dropout, which evaluation must switch off
        expected = naive_metrics(model, encode(held_out))
        trainer = RRHFTrainer(
            model=model, args=config(tmp_path, max_tokens_per_forward=budget), train_dataset=toy_records(2),
            eval_dataset=held_out, processing_class=TOKENIZER,
        )  # fmt: skip
        trainer._sums["queries"] += 3
        model.train()
        found = trainer.evaluate()
        for name, value in expected.items():
            assert found[f"eval_{name}"] == pytest.approx(value, abs=1e-4), name
        assert found["eval_loss"] == pytest.approx(expected["rank_loss"] + expected["sft_loss"], abs=1e-4)
        assert model.training
        assert trainer._sums == {"queries": 3}


def test_evaluation_fills_its_forwards(tmp_path: Path) -> None:
    model = tiny_model("llama", VOCABULARY)
    held_out = toy_records(5, seed=9)
    trainer = trainer_of(model, tmp_path, toy_records(2))
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.evaluate(held_out)
    assert len(calls) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.filterwarnings("ignore:BloomForCausalLM does not take")
def test_forward_says_what_it_takes(family: str, tmp_path: Path) -> None:
    """Decoding gives ``position_ids`` to models that name them, and left-padded rows need them."""
    model = tiny_model(family, VOCABULARY)
    before = inspect.signature(model.forward)
    assert ("position_ids" in before.parameters) is (family != "bloom")
    trainer = trainer_of(model, tmp_path, toy_records(2))
    assert inspect.signature(trainer.model.forward) == before


# --- gradients --------------------------------------------------------------------------------------------------


def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


GRADIENT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {}),
    "tied": ("llama-tied", {}),
    "window": ("mistral", {}),
    "checkpointing": ("llama-tied", {"gradient_checkpointing": True}),
    "padded": ("llama", {"path": "padded"}),
    "lora": ("llama-tied", {"peft": True}),
    "lora and checkpointing": ("llama", {"peft": True, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_two_passes_give_the_gradient_of_one(case: str, tmp_path: Path) -> None:
    family, given = GRADIENT_CASES[case]
    records = toy_records(5, seed=4, responses=(2, 6))
    found = {}
    for budget in (4096, 30):
        options = dict(given)
        torch.manual_seed(0)
        peft_config = lora() if options.pop("peft", False) else None
        path = options.pop("path", "tree")
        gradients = Gradients()
        trainer = trainer_of(
            in_fp64(tiny_model(family, VOCABULARY)), tmp_path, records, learning_rate=0.0, max_steps=1,
            gradient_accumulation_steps=5, max_tokens_per_forward=budget, callbacks=[gradients],
            peft_config=peft_config, **options,
        )  # fmt: skip
        assert trainer.path == "tree"
        trainer.path = path
        sliced = [f for f in plan_forwards(trainer.train_dataset.records, budget, trainer.path) if f.slices]
        assert len(sliced) >= 2 * (budget == 30)
        assert not (sliced and budget == 4096)
        trainer.train()
        found[budget] = gradients.found
    if "lora" in case:
        assert all("lora" in name for name in found[30])
    else:
        assert any("embed" in name for name in found[30])
    assert_close(found[30], found[4096], 1e-8)
    if "lora" not in case:
        _, naive = naive_gradients(in_fp64(tiny_model(family, VOCABULARY)), encode(records), LossSettings())
        assert_close(found[30], naive, 1e-8)


@pytest.mark.parametrize("scaler", [None, object()])
def test_a_loss_that_is_scaled_is_on_the_device(
    scaler: object | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaler on the CPU reads what has not come from the device yet. Without one nothing is copied there."""
    records = [*toy_records(2, seed=4, responses=(6, 6)), *toy_records(2, seed=5, responses=(1, 1))]
    trainer = trainer_of(tiny_model("llama", VOCABULARY), tmp_path, records, max_tokens_per_forward=30)
    monkeypatch.setattr(RRHFConfig, "device", torch.device("meta"))
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    seen: list[str] = []
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: seen.append(loss.device.type))
    with our_attention(trainer.model):
        trainer._whole_step(trainer.model, trainer.train_dataset.records, len(records))
        trainer._idle_pass(lambda part: trainer._compute(trainer.model, part))
    slices = [len(f.slices) for f in plan_forwards(trainer.train_dataset.records, 30, "tree")]
    assert 0 in slices and max(slices) > 1
    assert seen == ["cpu" if scaler is None else "meta"] * (sum(n or 1 for n in slices) + 1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
def test_both_passes_draw_the_same_dropout_masks(checkpointing: bool, tmp_path: Path) -> None:
    """The reference runs the same slices once, in one graph, from the same random state."""
    records = [*toy_records(3, seed=4, responses=(5, 8)), *toy_records(3, seed=5, responses=(1, 2))]
    model = tiny_model("gpt2", VOCABULARY).double()
    assert model.config.resid_pdrop == model.config.attn_pdrop == model.config.embd_pdrop == 0.1
    trainer = trainer_of(model, tmp_path, records, max_tokens_per_forward=30)
    encoded = trainer.train_dataset.records
    forwards = plan_forwards(encoded, 30, trainer.path)
    assert sum(len(f.slices) for f in forwards) >= 4
    assert any(not f.slices for f in forwards)
    if checkpointing:
        model.gradient_checkpointing_enable()

    def reference(seed: int) -> dict[str, Tensor]:
        model.train()
        model.zero_grad()
        torch.manual_seed(seed)
        total: Any = 0
        for forward in forwards:
            parts = [[part] for part in forward.slices] or [forward.records]
            sums = torch.cat([trainer._compute(model, part).sums for part in parts])
            total = total + trainer._loss(forward.records, sums, None) / len(encoded)
        total.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    with our_attention(model):
        expected, other = reference(7), reference(8)
        model.zero_grad()
        torch.manual_seed(7)
        trainer.training_step(model, encoded, num_items_in_batch=len(encoded))
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert_close(ours, expected, 1e-8)
    with pytest.raises(AssertionError):  # other masks, another gradient
        assert_close(ours, other, 1e-3)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_masks_of_a_gpu_are_drawn_again_too(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a generator in the place of the one of such a GPU, which is not here."""
    drawn = torch.Generator().manual_seed(3)
    module = getattr(torch, device)
    monkeypatch.setattr(module, "get_rng_state", lambda *_: drawn.get_state())
    monkeypatch.setattr(module, "set_rng_state", lambda state, *_: drawn.set_state(state))
    kept = RandomState.now(torch.device(device))
    first = torch.rand(3, generator=drawn)
    with kept.replayed(torch.device(device)):
        assert torch.equal(torch.rand(3, generator=drawn), first)
    assert not torch.equal(torch.rand(3, generator=drawn), first)


@pytest.mark.parametrize("budget", [2048, 40])
def test_the_loss_is_a_mean_over_queries_however_they_are_split(budget: int, tmp_path: Path) -> None:
    records = toy_records(11, seed=6)  # 8 queries a step: the second step of an epoch has 3
    found = []
    for per_device, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        model = in_fp64(tiny_model("llama", VOCABULARY))
        trainer = trainer_of(
            model, tmp_path, records, learning_rate=0.01, num_train_epochs=2, max_tokens_per_forward=budget,
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        log = [line for line in trainer.state.log_history if "rank_loss" in line]
        assert len(log) == 4
        for line in log:  # the steps of 3 queries are means over 3
            assert line["loss"] == pytest.approx(line["rank_loss"] + line["sft_loss"], abs=1e-4)
        found.append((log, {name: p.detach() for name, p in model.named_parameters()}))
    start = dict(in_fp64(tiny_model("llama", VOCABULARY)).named_parameters())
    assert any(not torch.allclose(start[name], p, atol=1e-4) for name, p in found[0][1].items())
    for log, weights in found[1:]:
        assert_close(weights, found[0][1], 1e-8)
        for ours, theirs in zip(log, found[0][0], strict=True):
            for name in ("loss", "rank_loss", "sft_loss", "rank_accuracy", "violated_pairs", "best_logprob"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name


def test_a_copy_of_the_model_computes_with_its_own_weights(tmp_path: Path) -> None:
    model = tiny_model("llama", VOCABULARY)
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    trainer = trainer_of(model, tmp_path, toy_records(2))
    copied = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert float(copied(input_ids=ids).logits.abs().max()) == 0
    assert torch.equal(trainer.model(input_ids=ids).logits, before)
    # the check of the attention path compares a low-precision model's copies in fp32
    low = trainer_of(model.bfloat16(), tmp_path / "low", toy_records(2)).model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable_path(low) == "tree"


def test_the_order_changes_with_the_epoch(tmp_path: Path) -> None:
    trainer = trainer_of(
        tiny_model("llama", VOCABULARY), tmp_path, toy_records(8, seed=6), learning_rate=0.0, num_train_epochs=2,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer.train()
    losses = [line["sft_loss"] for line in trainer.state.log_history if "sft_loss" in line]
    assert losses[:8] != losses[8:]
    assert sorted(losses[:8]) == pytest.approx(sorted(losses[8:]), abs=1e-5)


# --- saving and resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_a_saved_model_loads_and_gives_the_same_numbers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = toy_records(4, seed=1)
    model = tiny_model(family, VOCABULARY)
    trainer = trainer_of(model, tmp_path, records, learning_rate=0.05, max_steps=2)
    before = all_sums(model, encode(records)).detach()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    after = all_sums(model.eval(), encode(records)).detach()
    assert not torch.allclose(before, after, atol=1e-2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(all_sums(loaded.eval(), encode(records)), after)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("ab").input_ids == TOKENIZER("ab").input_ids
    modes = {file.stat().st_mode for file in (tmp_path / "saved").iterdir()}
    assert len(modes) == 1  # of the umask; safetensors writes weights for their user alone


class KilledError(Exception):
    pass


class Kill(TrainerCallback):
    """Stops the run between two micro-batches of the step after ``step``, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KilledError


@pytest.mark.parametrize("budget", [2048, 30])
def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(budget: int, tmp_path: Path) -> None:
    options = {
        "num_train_epochs": 3, "gradient_accumulation_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2,
        "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "save_strategy": "steps", "save_steps": 3,
        "max_tokens_per_forward": budget,
    }  # fmt: skip
    records = toy_records(14, seed=8)  # 4 steps an epoch, the last of 2 queries; step 7 lies within the second epoch

    def run(folder: Path, resume: bool = False, **more: Any) -> tuple[RRHFTrainer, dict[str, Tensor]]:
        model = tiny_model("gpt2", VOCABULARY)
        trainer = trainer_of(model, folder, records, **options, **more)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer, {name: p.detach().clone() for name, p in model.named_parameters()}

    whole, expected = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", callbacks=[Kill(7)])
    assert sorted(p.name for p in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    resumed, found = run(tmp_path / "killed", resume=True)
    assert resumed.state.global_step == whole.state.global_step == 12
    for name, value in expected.items():
        assert torch.equal(found[name], value), name

    def curve(trainer: RRHFTrainer) -> list[dict[str, float]]:
        lines = [line for line in trainer.state.log_history if "rank_loss" in line]
        return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]

    assert curve(resumed) == curve(whole)
    assert [line["step"] for line in curve(whole)] == list(range(1, 13))


# --- what comes in ----------------------------------------------------------------------------------------------


def test_trl_preference_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "ab", "chosen": "cd", "rejected": "e"},
        {
            "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
            "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}],
        },
    ]
    trainer = trainer_of(tiny_model("llama", VOCABULARY), tmp_path, rows, max_steps=1, gradient_accumulation_steps=2)
    format = TextFormat(TOKENIZER)
    text, chat = trainer.train_dataset.records
    assert [format.decode(response) for response in text.responses] == ["cd", "e"]
    assert [format.decode(response) for response in chat.responses] == ["Yes", "No"]
    for record in (text, chat):
        good, bad = record.scores
        assert good is not None
        assert bad is not None
        assert good > bad
    trainer.train()
    assert trainer.state.log_history[0]["rank_accuracy"] in (0.0, 0.5, 1.0)


def test_a_preference_row_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 1"):
        rows = [{"prompt": "ab", "chosen": "cd", "rejected": "e"}, {"prompt": "ab", "chosen": "cd", "rejected": ["e"]}]
        trainer_of(tiny_model("llama", VOCABULARY), tmp_path, rows)


def test_a_datasets_dataset_and_plain_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [
        {"query": record.query, "responses": record.responses, "scores": record.scores, "finish": record.finish}
        for record in toy_records(4, seed=1)
    ]
    expected = encode(toy_records(4, seed=1))
    for given in (Dataset.from_list(rows), rows, (row for row in rows)):
        trainer = trainer_of(tiny_model("llama", VOCABULARY), tmp_path, given, max_steps=1)
        for ours, theirs in zip(trainer.train_dataset.records, expected, strict=True):
            read = [i for i, score in enumerate(theirs.scores) if score is not None]
            assert [list(response) for response in ours.responses] == [theirs.responses[i] for i in read]
            assert (list(ours.query), ours.scores) == (theirs.query, [theirs.scores[i] for i in read])


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    rows = [{"query": "a", "responses": ["b"], "scores": [1.0]}, {"query": "a", "responses": ["b", "c"], "scores": [1]}]
    with pytest.raises(UserError, match="row 1"):
        trainer_of(tiny_model("llama", VOCABULARY), tmp_path, rows)


def test_records_that_cannot_be_trained_on_are_counted() -> None:
    rows = [
        Record(query="ab", responses=["cd", "ef"], scores=[1.0, 0.0]),
        Record(query="ab", responses=["cd", "ef"], scores=[None, None]),
        Record(query="abcdefghij", responses=["cd"], scores=[1.0]),
        Record(query="abcdefghijkl", responses=["cd"], scores=[1.0]),
        Record(query="ab", responses=["cd", "ef"], scores=[1.0, None]),
        Record(query="ab", responses=["cd"], scores=[1.0]),
        Record(query="abcdefg", responses=["hijkl"], scores=[1.0]),
    ]
    data = EncodedRecords(rows, TextFormat(TOKENIZER), max_length=10)
    assert len(data) == 4
    assert data.unranked == 3
    assert sorted(data.skipped.values()) == [1, 2]
    summary = data.summary()
    assert "4 records to train on" in summary
    assert "1 skipped: no response is scored" in summary
    assert "2 skipped: the query leaves no room for a response (--max_length 10" in summary
    assert "3 with fewer than two scored responses" in summary
    assert "responses cut" in summary


@pytest.mark.parametrize("loss", ["hinge", "none"])
@pytest.mark.parametrize("released", [False, True])
def test_what_no_loss_reads_is_not_computed(loss: str, released: bool, tmp_path: Path) -> None:
    rows = [
        Record(query="ab", responses=["a longer one", "cd", "ef", "g"], scores=[None, 0.5, 2.0, 2.0]),
        Record(query="ab", responses=["cd", "e"], scores=[-1.0, -3.0]),
    ]
    encoded = encode(rows)
    settings = LossSettings(ranking_loss=loss, released_compat=released)
    model = tiny_model("llama", VOCABULARY)
    expected = [  # of all the responses, also those that are not computed
        rrhf_loss(
            record_sums(model, record), torch.tensor([len(response) for response in record.responses]),
            torch.tensor([math.nan if s is None else s for s in record.scores]), settings,
            len(record.query) + max(map(len, record.responses)),
        ).total.item()
        for record in encoded
    ]  # fmt: skip
    trainer = trainer_of(
        model, tmp_path, rows, max_steps=1, gradient_accumulation_steps=2, ranking_loss=loss, released_compat=released
    )
    computed: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.train()
    kept = [[1, 2, 3], [0, 1]] if loss == "hinge" else [[2], [0]]
    tokens = [
        len(record.query) + sum(len(record.responses[i]) - 1 for i in read)
        for record, read in zip(encoded, kept, strict=True)
    ]
    assert computed == [sum(tokens)]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert ("violated_pairs" in trainer.state.log_history[0]) is (loss == "hinge")


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    rows = [Record(query="ab", responses=["cd"], scores=[None])]
    with pytest.raises(UserError, match=r"no record is left to train on.*1 skipped: no response is scored"):
        trainer_of(tiny_model("llama", VOCABULARY), tmp_path, rows)
    with pytest.raises(UserError, match="no record is left to train on"):
        trainer_of(tiny_model("llama", VOCABULARY), tmp_path, [])


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_rows_that_the_model_has_no_positions_for(which: str, tmp_path: Path) -> None:
    record = Record(query="a" * 300, responses=["b" * 100, "c" * 300], scores=[0.0, 1.0], id="long")
    datasets = {"train_dataset": toy_records(2), "eval_dataset": toy_records(2), which: [record]}

    def trainer(family: str, **options: Any) -> RRHFTrainer:
        model = tiny_model(family, len(tiny_tokenizer()))
        args = config(tmp_path, **options)
        return RRHFTrainer(model=model, args=args, processing_class=tiny_tokenizer(), **datasets)

    with pytest.raises(UserError, match=r"record 'long': query and response have 601 .* positions for 512: give"):
        trainer("gpt2", max_length=1024)
    trainer("gpt2", max_length=512)
    trainer("llama", max_length=1024)  # computes its positions


def test_tokens_that_the_model_has_no_embeddings_of(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"record 'toy-0' has the token .* embeddings of 50: the tokenizer is another"):
        trainer_of(tiny_model("llama", 50), tmp_path, toy_records(3))


def test_only_unranked_records_train_as_supervised_fine_tuning(tmp_path: Path) -> None:
    rows = toy_records(3, seed=1, responses=(1, 1))
    trainer = trainer_of(tiny_model("llama", VOCABULARY), tmp_path, rows, max_steps=1)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["rank_loss"] == 0
    assert line["loss"] == pytest.approx(line["sft_loss"], abs=1e-4)
    assert "rank_accuracy" not in line  # there is no pair


@pytest.mark.parametrize("budget", [2048, 12])
def test_a_loss_that_is_not_finite_stops_and_names_the_records(budget: int, tmp_path: Path) -> None:
    model = tiny_model("llama", VOCABULARY)
    records = toy_records(2, seed=1, responses=(2, 3))
    trainer = trainer_of(
        model, tmp_path, records, learning_rate=0.1, max_steps=3, gradient_accumulation_steps=2,
        max_tokens_per_forward=budget,
    )  # fmt: skip
    model.lm_head.weight.data[5] = math.nan
    before = model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(UserError, match=r"step 1: the loss is nan on the records? .*toy-[01]"):
        trainer.train()
    assert torch.equal(model.model.embed_tokens.weight, before)


# A user's module of ranking losses: finite, with a gradient that is not (√ at 0); on records with a score of 9 alone.
ROOTED = """
import torch
from rrhf.losses import needs

def rooted(record, settings):
    nothing = (record.logprobs - record.logprobs.detach()).sum()
    return torch.sqrt(nothing) if bool((record.scores == 9).any()) else nothing

def not_a_number(record, settings):
    return rooted(record, settings) * float("nan") if bool((record.scores == 9).any()) else rooted(record, settings)

@needs("old_token_logprobs")
def off_policy(record, settings):
    return record.old_token_logprobs[0].sum()
"""


@pytest.fixture
def rooted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rooted_losses.py").write_text(ROOTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("budget", [2048, 12])
def test_a_gradient_that_is_not_finite_updates_nothing(rooted: Path, budget: int, max_grad_norm: float) -> None:
    records = toy_records(4, seed=1, responses=(2, 3))
    records[2] = dataclasses.replace(records[2], scores=[9.0, *records[2].scores[1:]])
    model = tiny_model("llama", VOCABULARY)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(
        model, rooted / "out", records, learning_rate=0.1, max_steps=3, gradient_accumulation_steps=4,
        optim="adamw_torch", max_tokens_per_forward=budget, max_grad_norm=max_grad_norm,
        ranking_loss="rooted_losses:rooted", save_strategy="steps", save_steps=1,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"step 1: .* finite, but its gradient's norm is (nan|inf)") as caught:
        trainer.train()
    assert all(record.id in str(caught.value) for record in records)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list((rooted / "out").glob("checkpoint-*"))


def test_a_loss_that_needs_what_training_does_not_give(rooted: Path) -> None:
    with pytest.raises(UserError, match="--ranking_loss rooted_losses:off_policy: it needs old_token_logprobs"):
        trainer_of(tiny_model("llama", VOCABULARY), rooted, toy_records(1), ranking_loss="rooted_losses:off_policy")


@pytest.mark.parametrize("budget", [2048, 200])
@pytest.mark.parametrize("keep", [True, False])
def test_logits_are_kept_where_the_setting_says_so(keep: bool, budget: int, tmp_path: Path) -> None:
    records = toy_records(1, seed=1)
    model = tiny_model("llama", VOCABULARY)
    trainer = trainer_of(model, tmp_path, records, max_tokens_per_forward=budget, keep_logits=keep)
    (record,) = trainer.train_dataset.records
    nodes: list[Any] = [trainer._compute(model, [record]).sums.grad_fn]
    for node in nodes:  # the graph, from the sums towards the weights
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
        if "TokenLogprobs" in node.name():
            break
    assert [logits.shape[1] for logits in node.kept] == [VOCABULARY] * keep


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_deepspeed_is_refused(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "environment":  # accelerate launch with a DeepSpeed configuration
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"DeepSpeed .*an optimiser step of every forward pass.* FSDP2"):
        config(tmp_path, **({"deepspeed": "zero3.json"} if how == "flag" else {}))


def test_one_process_uses_one_of_several_gpus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rrhf"), "propagate", True)  # an earlier command may have set it
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=2)
    args._n_gpu = 2  # as transformers counts them on such a machine
    with caplog.at_level("WARNING", logger="rrhf"):
        trainer = RRHFTrainer(
            model=tiny_model("llama", VOCABULARY), args=args, train_dataset=toy_records(4), processing_class=TOKENIZER
        )
    assert "2 GPUs are here" in caplog.text
    assert "torchrun --nproc_per_node 2" in caplog.text
    assert trainer.args.n_gpu == 1
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)
    assert trainer._train_batch_size == 2


def test_bad_settings_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        config(
            tmp_path, ranking_loss="hing", sft_weight=-1.0, max_length=1, max_tokens_per_forward=0,
            per_device_train_batch_size=0, chat_template_kwargs="[]", max_query_length=0, interpolation=0.0,
            save_only_model=True,
        )  # fmt: skip
    message = str(caught.value)
    for name in (
        "ranking_loss", "sft_weight", "max_length", "max_tokens_per_forward", "per_device_train_batch_size",
        "chat_template_kwargs", "max_query_length", "interpolation", "save_only_model",
    ):  # fmt: skip
        assert f"--{name} " in message, name
    assert "did you mean 'hinge'" in message


def test_a_trainer_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="processing_class"):
        RRHFTrainer(model=tiny_model("llama", VOCABULARY), args=config(tmp_path), train_dataset=toy_records(1))


@pytest.mark.parametrize("known, missing", [({}, "RANK and MASTER_ADDR"), ({"RANK": "0"}, "MASTER_ADDR")])
def test_processes_that_cannot_find_each_other_are_refused(
    known: dict[str, str], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **known}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"WORLD_SIZE says 2 processes, but {missing} are not set"):
        config(tmp_path)


# --- several processes ------------------------------------------------------------------------------------------


def launch(script: Any, folder: Path, *arguments: str) -> None:
    """Run a script in two processes that find each other over the loopback."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_", "LOCAL_"))}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, script.__file__, str(folder), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.filterwarnings("ignore:BloomForCausalLM does not take")
def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    launch(ddp_train, tmp_path)
    for case in ddp_train.CASES:
        log, weights = ddp_train.train(case, tmp_path / "one", queries=2)
        together = json.loads((tmp_path / f"{case}.json").read_text())
        assert len(log) == len(together) == 6
        for ours, theirs in zip(together, log, strict=True):
            for name in ("loss", "rank_loss", "sft_loss", "violated_pairs", "best_logprob", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), (case, name)
        assert log[-1]["loss"] < log[0]["loss"]
        final = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        assert_close(final, weights, 1e-4)


def test_sharded_weights_give_the_gradient_of_one_process(tmp_path: Path) -> None:
    """FSDP2 on two CPU processes; the script asserts that the parameters are sharded."""
    launch(fsdp_pass, tmp_path)
    encoded = encode(fsdp_pass.records())
    for case, (family, budget, shares) in fsdp_pass.CASES.items():
        found = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        if case in fsdp_pass.LOSSES:
            alone = one_process(case, family, budget, tmp_path)
            for name in ("loss", "eval_loss"):
                assert float(found.pop(name)) == pytest.approx(float(alone.pop(name)), abs=1e-4)
            assert_close(found, alone, 1e-5)
            continue
        records = [encoded[i] for share in shares for i in share]
        loss, expected = naive_gradients(tiny_model(family, VOCABULARY), records, LossSettings())
        assert float(found.pop("loss")) == pytest.approx(loss, abs=1e-4), case
        held_out = naive_metrics(tiny_model(family, VOCABULARY), encoded[:1])  # process 1 has no record to evaluate
        assert float(found.pop("eval_loss")) == pytest.approx(held_out["rank_loss"] + held_out["sft_loss"], abs=1e-4)
        assert_close(found, expected, 1e-5)


def one_process(case: str, family: str, budget: int, folder: Path) -> dict[str, Tensor]:
    """What ``fsdp_pass`` saves of a case, from one process whose weights are whole."""
    gradients = Gradients()
    rows = fsdp_pass.records()
    trainer = RRHFTrainer(
        model=tiny_model(family, VOCABULARY), train_dataset=rows, processing_class=TOKENIZER, callbacks=[gradients],
        args=config(folder / "one", max_tokens_per_forward=budget, gradient_accumulation_steps=len(rows), max_steps=1,
                    learning_rate=0.0, **fsdp_pass.LOSSES[case]), reference_sums=fsdp_pass.REFERENCE,
    )  # fmt: skip
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "rank_loss" in line]
    assert line["batch_kl"] > 1
    losses = {"loss": line["loss"], "eval_loss": trainer.evaluate(rows[:1])["eval_loss"]}
    return {**{name: torch.tensor(value) for name, value in losses.items()}, **gradients.found}


def test_a_gradient_that_is_not_finite_stops_all_processes(rooted: Path) -> None:
    launch(ddp_gradient, rooted, "rooted")
    for rank in range(2):
        said = (rooted / f"{rank}.txt").read_text()
        assert "step 1: the loss is finite, but its gradient's norm is nan" in said or "norm is inf" in said
        assert all(record.id in said for record in ddp_gradient.records())  # also those of the other process


def test_a_loss_that_is_not_finite_in_one_process_stops_all(rooted: Path) -> None:
    launch(ddp_gradient, rooted, "not_a_number")
    messages = [(rooted / f"{rank}.txt").read_text() for rank in range(2)]
    assert "step 1: the loss is nan on the records" in messages[0]
    assert ddp_gradient.records()[0].id in messages[0]
    assert messages[0] == messages[1]


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_sums_and_gradients_stay_fp32_under_accelerates_fsdp2(family: str, tmp_path: Path) -> None:
    """As accelerate prepares a model for the shipped configuration, in bf16."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    trained = toy_records(3, seed=1, responses=(3, 5))
    _, expected = naive_gradients(tiny_model(family, VOCABULARY), encode(trained), LossSettings())
    model = tiny_model(family, VOCABULARY)
    trainer = trainer_of(model, tmp_path, trained)
    records = trainer.train_dataset.records
    with torch.no_grad():
        exact = all_sums(model, records)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", is_main_process=True, device="cpu"
    )
    _keep_sums_exact(accelerator)
    prepared = fsdp2_prepare_model(accelerator, model)
    assert isinstance(prepared, torch.distributed.fsdp.FSDPModule)
    with our_attention(prepared):
        sums = trainer._compute(prepared, records).sums
        assert sums.dtype == torch.float32
        assert not torch.equal(sums, sums.bfloat16().float())  # they were bf16 on no part of their way
        assert float((sums - exact).abs().max()) < 0.02 * float(exact.abs().max())
        (trainer._loss(records, sums, None) / len(records)).backward()
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32
    gradients = {name: p.grad.full_tensor() for name, p in prepared.named_parameters()}
    assert_close(gradients, expected, 0.1)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("asked", ["flag", "environment"])
def test_bfloat16_weights_become_fp32_under_accelerates_fsdp2(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the hardware has bfloat16: updates below its resolution would vanish."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    monkeypatch.setattr(placement, "native_bfloat16", lambda device: True)
    monkeypatch.setattr(RRHFConfig, "parallel_mode", ParallelMode.DISTRIBUTED)  # transformers' flag wants that
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True" if asked == "environment" else "false")
    model = tiny_model("llama", VOCABULARY).bfloat16()
    trainer = trainer_of(model, tmp_path, toy_records(2), bf16=None, fsdp=asked == "flag")
    assert trainer.accelerator.mixed_precision == "bf16"
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_mixed_precision(trainer.accelerator.mixed_precision)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", is_main_process=True, device="cpu"
    )
    prepared = fsdp2_prepare_model(accelerator, model)
    assert {parameter.dtype for parameter in prepared.parameters()} == {torch.float32}
    trainer.is_fsdp_enabled = True
    assert not takes_masters(trainer)


def test_float16_weights_are_refused(tmp_path: Path) -> None:
    """There is no loss scaling for them; those that are not trained may be."""
    with pytest.raises(UserError, match=r"weights are float16.*dtype=torch\.float32 or torch\.bfloat16"):
        trainer_of(tiny_model("llama", VOCABULARY).half(), tmp_path, toy_records(2))
    trainer_of(tiny_model("llama", VOCABULARY).half(), tmp_path, toy_records(2), peft_config=lora())


def test_float16_that_was_asked_for_stays(tmp_path: Path) -> None:
    model = tiny_model("llama", VOCABULARY).bfloat16()
    trainer = trainer_of(model, tmp_path, toy_records(2), bf16=None, fp16=True)
    assert trainer.args.fp16 and trainer.accelerator.mixed_precision == "fp16"


def test_weights_that_fsdp_would_train_without_masters_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Trainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:  # a CPU alone cannot shard
        made(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(UserError, match=r"FSDP would train bfloat16 weights without fp32 masters.*--dtype float32"):
        trainer_of(tiny_model("llama", VOCABULARY).bfloat16(), tmp_path, toy_records(2))
    trainer_of(tiny_model("llama", VOCABULARY), tmp_path, toy_records(2))
