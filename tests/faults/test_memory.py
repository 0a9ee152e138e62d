"""Out of memory in sampling, scoring and training: half at a time, said, and the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rrhf.common.errors import UserError
from rrhf.common.imports import call_own
from rrhf.models.batching import plan_forwards
from rrhf.models.out_of_memory import in_halves, is_out_of_memory, run_forwards
from rrhf.models.tokenization import EncodedRecord
from rrhf.training import forward
from rrhf.training.trainer import RRHFTrainer
from support import tiny
from support.models import tiny_model, tiny_tokenizer, toy_records
from support.tiny import lack
from support.training import config

MODEL = ("--model", "../model", "--device", "cpu", "--dtype", "float32")
SAMPLE = ("sample", *MODEL, "--data", "data.jsonl", "--policy", "top-p", "--num_responses", "2", "--max_new_tokens",
          "5", "--batch_size", "8", "--output", "out.jsonl")  # fmt: skip
SCORE = ("score", "--data", "data.jsonl", "--reward", "logprob:../model", "--device", "cpu", "--output", "out.jsonl",
         "--dtype", "float32")  # fmt: skip
TRAIN = ("train", *MODEL, "--data", "data.jsonl", "--output", "out", "--bf16", "false", "--max_steps", "3",
         "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-3",
         "--max_length", "64", "--report_to", "none", "--save_strategy", "no")  # fmt: skip
TRAIN_IN_PASSES = (*TRAIN, "--max_tokens_per_forward", "100")  # memory runs out when a part of the gradient is there
REWARD = ("reward-model", *TRAIN[1:])
PPO = ("baseline", "ppo", *MODEL, "--data", "data.jsonl", "--output", "out", "--reward", "tiny_rewards:vowels",
       "--rollout_queries", "4", "--num_responses", "2", "--max_new_tokens", "4", "--max_steps", "2",
       "--per_device_train_batch_size", "4", "--max_tokens_per_forward", "60")  # fmt: skip

CASES = {  # the command, where memory runs out, what is said, the file to compare
    "sample": (SAMPLE, lack("rrhf.sampling.decoding:decode", 1, 2), "2 queries at a time", "out.jsonl"),
    "score": (SCORE, lack("rrhf.models.passes:response_logprobs", 1), "tokens a forward from here on", "out.jsonl"),
    "train": (TRAIN_IN_PASSES, lack("rrhf.training.trainer:RRHFTrainer._one_pass", 2), "tokens a forward", "out"),
    "reward-model": (REWARD, lack("rrhf.training.reward_model.trainer:split_rewards", 2), "4 queries at a time", "out"),
    "ppo": (PPO, lack("rrhf.training.ppo:surrogate", 2), "tokens a forward from here on", "out"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    tiny.write_model(folder / "model")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_half_at_a_time_gives_the_same(case: str, place: Path) -> None:
    command, fault, said, output = CASES[case]
    folders = [tiny.workplace(place / f"{case}-{name}", {}) for name in ("whole", "lacking")]
    tiny.warm(*command, cwd=folders[0]).done()
    lacking = tiny.warm(*command, cwd=folders[1], faults=[fault]).done()
    assert said in lacking.err and "tried to allocate" in lacking.err, lacking.err
    if output == "out":
        one, other = (load_file(folder / "out/model.safetensors") for folder in folders)
        for name in one:  # the same sums in another order
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    else:
        one_rows, other_rows = (tiny.read_rows(folder / output) for folder in folders)
        numbers = [[n for row in rows for n in row.pop("scores", ())] for rows in (one_rows, other_rows)]
        assert numbers[0] == pytest.approx(numbers[1])
        assert [row["responses"] for row in one_rows] == [row["responses"] for row in other_rows]


def test_what_never_fits_is_said(place: Path) -> None:
    folder = tiny.workplace(place / "never", {})
    ended = tiny.warm(*SAMPLE, cwd=folder, faults=[lack("rrhf.sampling.decoding:decode", 1, 99)])
    assert ended.code == 2 and "Traceback" not in ended.err
    assert "out of memory, even with one of the queries at a time" in ended.err and "--dtype bfloat16" in ended.err
    tiny.warm(*SAMPLE, cwd=folder).done()


@pytest.mark.usefixtures("one_thread")
def test_what_training_measures_without_a_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference's sums, held-out losses, the tokens' log-probabilities: half at a time gives the same numbers."""
    tokenizer, records = tiny_tokenizer(), toy_records(6, seed=1, responses=(2, 4))

    def numbers() -> list[float]:
        args = config(tmp_path, ranking_loss="dpo", max_steps=1, max_tokens_per_forward=4000)
        trainer = RRHFTrainer(
            model=tiny_model("llama", len(tokenizer)), args=args, train_dataset=records, eval_dataset=records[:4],
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()  # ρ's sums first of all: measured under the model as it is
        measured = list(trainer.evaluate().values())
        filled = trainer.with_token_logprobs(records)
        return measured + [n for record in filled for row in record.extra["old_token_logprobs"] for n in row]

    whole = numbers()
    passes = forward.response_logprobs
    lacking: list[int] = []

    def lacks(model: Any, part: Any, *options: Any) -> Any:
        if not torch.is_grad_enabled() and len(part) > 1:
            lacking.append(len(part))
            raise torch.OutOfMemoryError("out of memory: tried to allocate 1 TiB")
        return passes(model, part, *options)

    monkeypatch.setattr(forward, "response_logprobs", lacks)
    assert numbers() == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert len(lacking) >= 3 and caplog.text.count("tokens a forward from here on") == len(lacking)


def test_another_error_is_no_lack_of_memory() -> None:
    def fails(size: int) -> int:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        in_halves(fails, 4, "sample", "queries", "--batch_size")
    assert not is_out_of_memory(ValueError("out of memory"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory")) and is_out_of_memory(MemoryError())
    # what cuBLAS has no memory for, where torch's allocator has had some
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))

    def own() -> None:
        raise MemoryError

    with pytest.raises(UserError) as failed:  # in a function of the user's
        call_own(own, "own")
    assert is_out_of_memory(failed.value) and not is_out_of_memory(UserError("out of memory"))


def test_every_record_passes_once_and_the_limit_stays() -> None:
    """Passes above a size fail: whatever is cut, every response is computed once, and nothing larger is tried again."""
    records = [EncodedRecord(str(i), [1] * 4, [[2] * (1 + i % 5)] * 3, [None] * 3) for i in range(20)]
    model = torch.nn.Linear(1, 1)
    sizes: list[int] = []

    def run(forward: Any) -> list[str]:
        size = sum(len(part.query) + sum(map(len, part.responses)) for part in forward.records)
        sizes.append(size)
        if size > 40:
            raise torch.OutOfMemoryError("out of memory")
        return [record.id for record in forward.records]

    for _ in range(2):
        seen = [name for _, names in run_forwards(model, records, 400, "tree", run) for name in names]
        assert sorted(seen) == sorted(record.id for record in records)
    before = len(sizes)
    list(run_forwards(model, records, 400, "tree", run))
    assert max(sizes[before:]) <= 40 and len(plan_forwards(records, 400)) < len(sizes) - before

    def never(forward: Any) -> None:
        raise MemoryError

    with pytest.raises(UserError, match="even with one response in a forward pass"):
        list(run_forwards(torch.nn.Linear(1, 1), records, 400, "tree", never))
