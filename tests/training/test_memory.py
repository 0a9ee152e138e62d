"""What a run needs, foretold: against the most that tensors took; and the token budget of a device."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from rrhf.common.errors import UserError
from rrhf.records.record import Record
from rrhf.training.config import RRHFConfig
from rrhf.training.memory import moment_bytes, storage_bytes, token_budget
from rrhf.training.trainer import RRHFTrainer
from support import tiny
from support.models import tiny_tokenizer, toy_records

GB = 10**9
TOKENIZER = tiny_tokenizer()


def measured_peak(trainer: Any) -> int:
    """The most that tensors take at a time in training, by what the allocator was asked for, with the weights."""
    weights = storage_bytes([*trainer.model.parameters(), *trainer.model.buffers()])
    gc.collect()  # what is freed while it counts must have been taken while it counts
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.train()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return weights + most


def trainer_of(model: Any, tokenizer: Any, records: Any, folder: Path, **options: Any) -> Any:
    args = RRHFConfig(
        output_dir=str(folder), bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        max_steps=2, logging_steps=100, **options,
    )  # fmt: skip
    return RRHFTrainer(model=model, args=args, train_dataset=records, processing_class=tokenizer)


def small_model(family: str) -> Any:
    """Random, and wide enough that what a run takes is what it takes in large models."""
    import transformers as t

    torch.manual_seed(0)
    vocabulary = len(TOKENIZER)
    if family == "bloom":
        return t.BloomForCausalLM(t.BloomConfig(vocab_size=vocabulary, hidden_size=128, n_layer=4, n_head=4))
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    tied = family == "llama-tied"
    config = t.LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    return t.LlamaForCausalLM(config)


CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "fp32": ("llama", torch.float32, {}),
    "masters": ("llama", torch.bfloat16, {}),
    "adafactor": ("llama", torch.bfloat16, {"optim": "adafactor"}),
    "sgd": ("llama-tied", torch.float32, {"optim": "sgd", "keep_logits": False}),
    "one forward a step": ("llama-tied", torch.float32, {"max_tokens_per_forward": 2000}),
    "padded": ("bloom", torch.float32, {}),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:BloomForCausalLM does not take")
@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_within_15_per_cent_of_the_peak(case: str, tmp_path: Path) -> None:
    family, dtype, options = CASES[case]
    records = toy_records(16, seed=2, responses=(4, 5))
    model = small_model(family).to(dtype)
    trainer = trainer_of(model, TOKENIZER, records, tmp_path, **{"max_tokens_per_forward": 160, **options})
    plan = trainer.memory_plan()
    assert plan.one_forward is (case == "one forward a step")
    assert plan.total == pytest.approx(measured_peak(trainer), rel=0.15), plan


@pytest.mark.skipif(os.environ.get("RRHF_LONG") != "1", reason="a minute of a real model: RRHF_LONG=1")
@pytest.mark.parametrize("k", [4, 32])
def test_a_plan_of_smollm2_is_within_15_per_cent_of_the_peak(smollm2: tuple[Any, Any], k: int, tmp_path: Path) -> None:
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    records = toy_records(48 // k, seed=2, responses=(k, k))
    trainer = trainer_of(model, tokenizer, records, tmp_path, max_tokens_per_forward=192)
    plan = trainer.memory_plan()
    assert plan.total == pytest.approx(measured_peak(trainer), rel=0.15), plan


def test_checkpoints_of_activations_are_planned_for(tmp_path: Path) -> None:
    plans = [
        trainer_of(
            small_model("llama"), TOKENIZER, toy_records(8, seed=2), tmp_path, gradient_checkpointing=checkpointing
        ).memory_plan()
        for checkpointing in (False, True)
    ]
    assert plans[1].activations < 0.6 * plans[0].activations
    assert plans[1].weights == plans[0].weights


def test_a_plan_disturbs_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(small_model("llama"), TOKENIZER, toy_records(4, seed=2), tmp_path)
    trainer.model.eval()
    before = torch.get_rng_state()
    trainer.memory_plan()
    assert torch.equal(torch.get_rng_state(), before)
    assert not trainer.model.training
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    alive = weakref.ref(next(trainer.model.parameters()))
    del trainer
    gc.collect()
    assert alive() is None  # nor does it hold the model


MODEL = {"parameters": 1_000_000_000, "width": 2048, "layers": 16}


def test_a_model_of_few_positions_is_planned_for(tmp_path: Path) -> None:
    """The passes that are counted have long queries where the data has; they stay within a small model's table."""
    import transformers as t

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
    model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=len(TOKENIZER), **sizes))
    records = [Record(query="a" * 40, responses=["b", "c"], scores=[0.0, 1.0])] * 2
    plan = trainer_of(model, TOKENIZER, records, tmp_path, max_length=48).memory_plan()
    assert plan.activations > 0


def test_the_token_budget_of_a_device() -> None:
    assert token_budget("cpu", 500 * GB, **MODEL) == 2048
    assert token_budget("mps", None, **MODEL) == 2048
    assert token_budget("cuda", 80 * GB, **MODEL) == 16384
    # 24 GB less 14 a parameter: 70 % of 10 GB at 34 · 2 · 2048 · 16 bytes a token is 3,141 tokens
    assert token_budget("cuda", 24 * GB, **MODEL) == 3072
    assert token_budget("cuda", 8 * GB, **MODEL) == 1024
    budgets = [token_budget("cuda", free * GB, **MODEL) for free in range(8, 80, 4)]
    assert budgets == sorted(budgets)


def test_a_budget_by_default_is_chosen_and_a_given_one_stays(tmp_path: Path) -> None:
    for given, chosen in ((None, 2048), (77, 77)):
        trainer = trainer_of(small_model("llama"), TOKENIZER, toy_records(2), tmp_path, max_tokens_per_forward=given)
        assert trainer.args.max_tokens_per_forward == chosen


def test_eight_bit_adam_without_bitsandbytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match="--optim adamw_bnb_8bit needs bitsandbytes"):
        trainer_of(small_model("llama"), TOKENIZER, toy_records(2), tmp_path, optim="adamw_bnb_8bit")


BNB = pytest.param(
    "adamw_bnb_8bit",
    marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="see make test-8bit"),
)


@pytest.mark.parametrize("optim", ["adamw_torch", BNB, "adafactor"])
def test_moments_are_as_large_as_planned(tmp_path: Path, optim: str) -> None:
    trainer = trainer_of(small_model("llama").bfloat16(), TOKENIZER, toy_records(2), tmp_path, optim=optim)
    trainer.train()
    inner = trainer.optimizer.optimizer.inner
    moments = [
        value
        for state in inner.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() and not name.startswith("qmap")  # of the code, one for all
    ]
    planned = moment_bytes(optim, trainer.model.parameters())
    assert sum(moment.nbytes for moment in moments) == pytest.approx(planned, rel=0.02)
    assert (torch.uint8 in {moment.dtype for moment in moments}) == (optim == "adamw_bnb_8bit")


def test_moments_worked_by_hand() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(512, 256)), torch.nn.Parameter(torch.zeros(256))]
    assert moment_bytes("adamw_torch_fused", parameters) == 8 * (512 * 256 + 256)
    assert moment_bytes("adafactor", parameters) == 4 * (512 + 256) + 4 * 256
    assert moment_bytes("sgd", parameters) == 0
    assert moment_bytes("adamw_bnb_8bit", parameters) == 2 * 512 * 256 + 8 * 512 + 8 * 256  # the small one in fp32


def test_a_dry_run_prints_the_table_and_writes_nothing(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(4))
    train = ("train", "--model", "model", "--data", "scored.jsonl", "--output", "out", "--device", "cpu",
             "--dtype", "bfloat16", "--report_to", "none", "--max_steps", "1")  # fmt: skip
    done = tiny.warm(*train, "--dry_run", cwd=tmp_path).done()
    for row in (
        "weights",
        "gradients",
        "fp32 masters",
        "optimiser's moments",
        "activations",
        "logits",
        "fullest",
        "has",
    ):
        assert row in done.out, row
    assert not (tmp_path / "out").exists()
    trained = tiny.warm(*train, cwd=tmp_path).done()
    assert "memory: about " in trained.err and "2048 tokens a forward" in trained.err
    assert json.loads((tmp_path / "out" / "training-settings.json").read_text())["max_tokens_per_forward"] == 2048
