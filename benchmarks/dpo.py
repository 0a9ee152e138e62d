"""Training by rankings against DPO on pairs: what a step over the same records costs in each library's trainer.

A record of k responses is one query here, and for TRL's ``DPOTrainer`` the k − 1 pairs of its best response with each
other one. Both train bf16 weights with AdamW, without gradient checkpointing, a step of the same records; DPO keeps a
second model as its reference, or ("precomputed") TRL computes its log-probabilities before the clock starts.
Needs ``pip install trl``. Each side runs in a process of its own.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from transformers import TrainerCallback

from common import arguments, data_name, hh_records, load, machine, memory_gb, peak_gb, report, table
from rrhf.models.batching import tree_tokens
from rrhf.models.kernels.cpu.memory import keep_freed_memory
from rrhf.models.tokenization import EncodedRecord
from rrhf.records.record import Record


class _Clock(TrainerCallback):
    """Notes when every step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Seconds of a step: the median without the first, which warms up."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))


def settings(folder: str, device: str, steps: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": device == "cpu",
    }


def ours(model: Any, tokenizer: Any, records: list[Record], options: dict[str, Any], batch: int) -> Any:
    from rrhf import RRHFConfig, RRHFTrainer

    options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
    config = RRHFConfig(**options, max_length=2048)
    return RRHFTrainer(model=model, args=config, train_dataset=records, processing_class=tokenizer)


def dpo(model: Any, tokenizer: Any, records: list[Record], options: dict[str, Any], batch: int, ahead: bool) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = []
    for record in records:
        best, *others = best_first(record.responses, record.scores)
        rows += [{"prompt": record.query, "chosen": best, "rejected": other} for other in others]
    pairs = len(rows) // len(records)
    options |= {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": batch, "max_length": 2048}
    config = DPOConfig(**options, precompute_ref_log_probs=ahead, bf16=False)
    reference = None if ahead else copy.deepcopy(model)
    return DPOTrainer(
        model=model, ref_model=reference, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def best_first(responses: Any, scores: Any) -> list[Any]:
    order = sorted(range(len(responses)), key=lambda i: -scores[i])
    return [responses[i] for i in order]


def as_text(tokenizer: Any, record: EncodedRecord) -> Record:
    responses = [tokenizer.decode(response, skip_special_tokens=True) for response in record.responses]
    return Record(tokenizer.decode(record.query, skip_special_tokens=True), responses, scores=list(record.scores))


def measure(side: str, model_name: str, device: str, batch: int, steps: int) -> dict[str, float]:
    """One side, in this process."""
    if side == "rrhf":
        keep_freed_memory()
    model, _ = load(model_name, device, "bfloat16")
    tokenizer, encoded = hh_records(batch * steps, k=6)
    records = [as_text(tokenizer, record) for record in encoded]
    memory_gb()
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = settings(folder, device, steps)
        if side == "rrhf":
            trainer = ours(model, tokenizer, records, options, batch)
        else:
            trainer = dpo(model, tokenizer, records, options, batch, side == "dpo, precomputed")
        trainer.add_callback(clock)
        trainer.train()
    tree = sum(map(tree_tokens, encoded)) / len(encoded)
    pairs = 0
    for record in encoded:
        best, *others = best_first(record.responses, record.scores)
        pairs += sum(2 * len(record.query) + len(best) + len(other) for other in others)
    return {
        "records_per_second": batch / clock.seconds(),
        "tokens_per_second": (tree if side == "rrhf" else pairs / len(encoded)) * batch / clock.seconds(),
        "gb": peak_gb(),
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--batch", type=int, default=4, help="records a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--row", help="(internal) one side, as JSON")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(*json.loads(options.row))))
        return
    found: dict[str, list[dict[str, float]]] = {"rrhf": [], "dpo": [], "dpo, precomputed": []}
    for _ in range(options.rounds):
        for side, results in found.items():
            row = json.dumps([side, options.model, options.device, options.batch, options.steps])
            done = subprocess.run([sys.executable, __file__, "--row", row], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(side, results[-1], file=sys.stderr, flush=True)
    rows = []
    for side, results in found.items():
        ratios = [b["records_per_second"] / a["records_per_second"] for a, b in zip(found["dpo"], results, strict=True)]
        rows.append(
            [
                side,
                f"{statistics.median(r['records_per_second'] for r in results):.3f}",
                f"{statistics.median(r['tokens_per_second'] for r in results):.0f}",
                f"{statistics.median(r['gb'] for r in results):.1f}",
                f"{statistics.median(ratios):.1f}× ({min(ratios):.1f}–{max(ratios):.1f})",
            ]
        )
    header = ["trainer", "records/s", "tokens/s that it computes", "peak GB", "records/s against DPO"]
    lines = [f"Machine: {machine()}. {options.model}, {data_name()}, k = 6; medians of {options.rounds} rounds.", ""]
    report("\n".join([*lines, table(header, rows)]), options.output)


if __name__ == "__main__":
    main()
