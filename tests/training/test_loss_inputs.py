"""What losses get of training: a reference's sums, log-probabilities a token, the step's KL; in one pass and in two."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles.logprobs import record_sums, response_tokens
from rrhf.common.errors import UserError
from rrhf.losses import LossSettings, rrhf_loss
from rrhf.models.tokenization import EncodedRecord, TextFormat
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.training.config import RRHFConfig
from rrhf.training.trainer import RRHFTrainer
from support.families import FAMILIES
from support.models import in_fp64, tiny_model, tiny_tokenizer, toy_records
from support.training import Gradients, config

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer()
REFERENCE = "logprob-sum:other#0123456789abcdef"


def step(folder: Path, **options: Any) -> RRHFConfig:
    """One step, which moves nothing."""
    return config(folder, **{"gradient_accumulation_steps": 4, "max_steps": 1, "learning_rate": 0.0, **options})


def trained(model: Any, folder: Path, records: Sequence[Any], column: str | None = None, **options: Any) -> RRHFTrainer:
    callbacks, peft_config = options.pop("callbacks", None), options.pop("peft_config", None)
    trainer = RRHFTrainer(
        model=model, args=step(folder, **options), train_dataset=records, processing_class=TOKENIZER,
        reference_sums=column, callbacks=callbacks, peft_config=peft_config,
    )  # fmt: skip
    trainer.train()
    return trainer


def scored(record: Record) -> Record:
    """The record with those responses alone that train."""
    return record.keeping([i for i, score in enumerate(record.scores) if score is not None])


def encoded(record: Record) -> EncodedRecord:
    return TextFormat(TOKENIZER).encode_record(record, 192)


def sums_of(model: Any, record: Record) -> list[float]:
    with torch.no_grad():
        return record_sums(model, encoded(record)).tolist()


def tokens_of(model: Any, record: Record) -> list[list[float]]:
    ids = encoded(record)
    with torch.no_grad():
        return [response_tokens(model, ids.query, response).tolist() for response in ids.responses]


def with_columns(records: Sequence[Record]) -> list[Record]:
    """Records that bring the sums and the tokens' log-probabilities of two other models, in fp64."""
    drew, reference = (in_fp64(tiny_model("llama", len(TOKENIZER), seed=seed)) for seed in (1, 2))
    found = []
    for record in records:
        columns = {"old_token_logprobs": drew, "reference_token_logprobs": reference}
        extra = {name: tokens_of(model, record) for name, model in columns.items()}
        rewards: dict[str, Any] = {**record.rewards, REFERENCE: sums_of(reference, record)}
        found.append(dataclasses.replace(record, extra=extra, rewards=rewards))
    return found


def naive(model: Any, records: Sequence[Record], settings: LossSettings) -> tuple[float, float, dict[str, Tensor]]:
    """The mean loss over the step's records, its KL and its gradients, one forward a response."""
    records = [scored(record) for record in records]
    tokens = [
        [response_tokens(model, ids.query, response) for response in ids.responses] for ids in map(encoded, records)
    ]
    sums = [torch.stack([row.sum() for row in rows]) for rows in tokens]
    ratios = [
        float(own) - other
        for record, values in zip(records, sums)
        for own, other in zip(values, record.rewards[REFERENCE])
    ]
    kl = max(0.0, sum(ratios) / len(ratios))
    losses = []
    for record, values, rows in zip(records, sums, tokens, strict=True):
        plain = [
            [torch.tensor(row, dtype=torch.float64) for row in record.extra[name]] for name in sorted(record.extra)
        ]
        losses.append(
            rrhf_loss(
                values, torch.tensor([len(row) for row in rows]), torch.tensor(record.scores, dtype=torch.float64),
                settings, reference_sums=torch.tensor(record.rewards[REFERENCE], dtype=torch.float64),
                batch_kl=torch.tensor(kl, dtype=torch.float64), token_logprobs=rows, old_token_logprobs=plain[0],
                reference_token_logprobs=plain[1],
            ).total
        )  # fmt: skip
    loss = torch.stack(losses).mean()
    named = dict(model.named_parameters())
    return loss.item(), kl, dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


CASES: dict[str, dict[str, Any]] = {
    "dpo": {"dpo_beta": 0.5},
    "kto": {"dpo_beta": 0.5},
    "grpo": {"token_kl": 0.3},
    "rloo": {"sft_weight": 0.5},
}


@pytest.mark.parametrize("budget", [4096, 30])
@pytest.mark.parametrize("name", CASES)
def test_one_pass_and_two_give_the_naive_loss_and_gradient(name: str, budget: int, tmp_path: Path) -> None:
    records = with_columns(toy_records(4, seed=4, responses=(3, 6)))
    options = {"ranking_loss": name, **CASES[name]}
    loss, kl, expected = naive(in_fp64(tiny_model("llama", len(TOKENIZER))), records, LossSettings(**options))
    assert kl > 0.01
    gradients = Gradients()
    model = in_fp64(tiny_model("llama", len(TOKENIZER)))
    trainer = trained(
        model, tmp_path, records, REFERENCE, max_tokens_per_forward=budget, callbacks=[gradients], **options
    )
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(loss, abs=1e-4)
    assert line.get("batch_kl", kl) == pytest.approx(kl, abs=1e-5) and ("batch_kl" in line) is (name == "kto")
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0 and gradients.found.keys() == expected.keys()
    for parameter, value in expected.items():
        assert float((gradients.found[parameter] - value).abs().max()) <= 1e-8 * largest, parameter
    held_out = trainer.evaluate(records)
    assert held_out["eval_loss"] == pytest.approx(loss, abs=1e-4)


# --- the reference ----------------------------------------------------------------------------------------------


def test_the_reference_is_the_model_as_it_was_before_the_first_step(tmp_path: Path) -> None:
    records = toy_records(6, seed=1, responses=(2, 4))
    model = tiny_model("llama", len(TOKENIZER))
    expected = [sums_of(model, scored(record)) for record in records]
    trainer = trained(model, tmp_path, records, ranking_loss="dpo", learning_rate=0.1, max_steps=3)
    for record, sums in zip(trainer.train_dataset.records, expected, strict=True):
        assert record.reference_sums == pytest.approx(sums, abs=1e-4)
    first, *_, last = [line for line in trainer.state.log_history if "rank_loss" in line]
    pairs = first["rank_loss"] / math.log(2)  # where π = ρ a pair costs log 2
    assert pairs == pytest.approx(round(4 * pairs) / 4, abs=1e-4) and pairs > 1
    assert last["rank_loss"] != pytest.approx(first["rank_loss"], rel=1e-3)
    with pytest.raises(UserError, match="needs the reference's sums: give them before"):
        trainer.evaluate(toy_records(2, seed=9))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_where_ratios_are_taken(checkpointing: bool, tmp_path: Path) -> None:
    """At the first step π is ρ: a pair costs log 2, and a response whose advantage is A costs −A, which sum to 0."""
    records = toy_records(4, seed=1, responses=(2, 4))
    asked = {"gradient_checkpointing": checkpointing, "max_steps": 1}
    dpo = trained(tiny_model("gpt2", len(TOKENIZER)), tmp_path, records, ranking_loss="dpo", **asked)
    layers = [module for module in dpo.model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert bool(layers) == checkpointing and all(module.training for module in layers)  # or they would not
    pairs = dpo.state.log_history[0]["rank_loss"] / math.log(2)
    assert pairs == pytest.approx(round(4 * pairs) / 4, abs=1e-5)
    model = tiny_model("gpt2", len(TOKENIZER))
    drawn = RRHFTrainer(model=model, args=step(tmp_path), train_dataset=records, processing_class=TOKENIZER)
    filled = drawn.with_token_logprobs([scored(record) for record in records])
    grpo = trained(tiny_model("gpt2", len(TOKENIZER)), tmp_path, filled, ranking_loss="grpo", **asked)
    assert abs(grpo.state.log_history[0]["rank_loss"]) < 1e-5
    rrhf = trained(tiny_model("gpt2", len(TOKENIZER)), tmp_path, records, **asked)
    assert rrhf.model.training and all(module.training for module in rrhf.model.modules())  # as ever


@pytest.mark.parametrize("loss", ["dpo", "hinge"])
def test_so_are_rates_of_layers_that_are_checkpointed(loss: str, tmp_path: Path) -> None:
    """OPT's layers drop by a rate of their own, in the training mode that checkpointing needs."""
    records, vocabulary = toy_records(4, seed=1, responses=(2, 4)), len(TOKENIZER)
    model = FAMILIES["opt"].make(vocab_size=vocabulary, dropout=0.1, layerdrop=0.2)
    opt = trained(model, tmp_path, records, ranking_loss=loss, gradient_checkpointing=True, max_steps=1)
    layers = opt.model.model.decoder.layers
    assert all(layer.training for layer in layers)
    assert {layer.dropout for layer in layers} == {0.0 if loss == "dpo" else 0.1}
    assert opt.model.model.decoder.layerdrop == (0.0 if loss == "dpo" else 0.2)
    assert opt.model.config.dropout == 0.1
    if loss == "dpo":
        pairs = opt.state.log_history[0]["rank_loss"] / math.log(2)
        assert pairs == pytest.approx(round(4 * pairs) / 4, abs=1e-5)


def test_an_adapter_is_switched_off_for_the_reference(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    records = toy_records(2, seed=1, responses=(2, 4))
    expected = [sums_of(tiny_model("llama", len(TOKENIZER)), scored(record)) for record in records]
    trainer = trained(tiny_model("llama", len(TOKENIZER)), tmp_path, records, ranking_loss="ipo", peft_config=lora)
    for record, sums in zip(trainer.train_dataset.records, expected, strict=True):
        assert record.reference_sums == pytest.approx(sums, abs=1e-4)


def test_a_reference_by_its_name(tmp_path: Path) -> None:
    other = tiny_model("llama", len(TOKENIZER), seed=5)
    other.save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    records = toy_records(2, seed=1, responses=(2, 4))
    asked = {"ranking_loss": "dpo", "reference_model": str(tmp_path / "other")}
    trainer = trained(tiny_model("llama", len(TOKENIZER)), tmp_path, records, **asked)
    for record, given in zip(trainer.train_dataset.records, records, strict=True):
        assert record.reference_sums == pytest.approx(sums_of(other, scored(given)), abs=1e-4)
    tiny_tokenizer(eos="<|im_end|>").save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"--reference_model .*its tokenizer is not that of the model"):
        trained(tiny_model("llama", len(TOKENIZER)), tmp_path, records, **asked)


# --- tokens -----------------------------------------------------------------------------------------------------


def test_log_probabilities_of_sampled_tokens_travel_with_the_records(tmp_path: Path) -> None:
    records = [scored(record) for record in toy_records(3, seed=7, responses=(2, 5))]
    model = tiny_model("gpt2", len(TOKENIZER))  # with dropout, which must be off
    trainer = RRHFTrainer(
        model=model, args=step(tmp_path, max_tokens_per_forward=30), train_dataset=records, processing_class=TOKENIZER
    )
    model.train()
    filled = trainer.with_token_logprobs(records)
    assert model.training
    for record, before in zip(filled, records, strict=True):
        for row, expected in zip(record.extra["old_token_logprobs"], tokens_of(model.eval(), before), strict=True):
            assert row == pytest.approx(expected, abs=1e-5)
    write_records(tmp_path / "window.jsonl", filled)
    again = list(read_records(tmp_path / "window.jsonl", require="scores"))
    assert [record.extra for record in again] == [record.extra for record in filled]  # bit for bit
    kept = filled[0].keeping([1])
    assert kept.extra["old_token_logprobs"] == filled[0].extra["old_token_logprobs"][1:2]
    # the policy has not moved: every ratio is 1, and the advantages of a record sum to 0
    trainer = trained(tiny_model("gpt2", len(TOKENIZER)).eval(), tmp_path, again, ranking_loss="grpo")
    assert abs(trainer.evaluate(again)["eval_loss"]) < 1e-5


def test_a_loss_over_tokens_without_them_is_refused(tmp_path: Path) -> None:
    records = [scored(record) for record in toy_records(2, seed=7, responses=(2, 5))]
    model = tiny_model("llama", len(TOKENIZER))
    with pytest.raises(
        UserError, match=r"--ranking_loss grpo: it needs old_token_logprobs, .*'toy-0'.*--resample_steps"
    ):
        trained(model, tmp_path, records, ranking_loss="grpo")
    rows = [[[-1.0]] * len(record.responses) for record in records]
    wrong = [dataclasses.replace(r, extra={"old_token_logprobs": row}) for r, row in zip(records, rows, strict=True)]
    with pytest.raises(UserError, match="record 'toy-0': old_token_logprobs must have one number for each"):
        trained(model, tmp_path, wrong, ranking_loss="grpo")
    brought = with_columns(records)
    for record in brought:
        del record.extra["reference_token_logprobs"]
    with pytest.raises(UserError, match=r"it needs reference_token_logprobs, .*leave --token_kl 0"):
        trained(model, tmp_path, brought, ranking_loss="rloo", token_kl=0.1)
    json.dumps([record.extra for record in brought])  # as a file of records has it
