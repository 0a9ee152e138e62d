"""Training: records a second, share of the matmul peak and peak memory, against padded rows with a full log-softmax.

Each row runs in a process of its own, so that peak memory is its own. The opponent is how the released code does it:
one query a forward, its k responses padded to [k, T], the log-softmax of all positions at once; in bf16 the faster of
autocast and bf16 weights counts.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Any

import torch

from common import (
    arguments,
    fastest_peak,
    hh_records,
    load,
    machine,
    matmul_peak,
    memory_gb,
    peak_gb,
    report,
    seconds,
    table,
    tensors_gb,
)
from rrhf.attention import our_attention
from rrhf.batching import plan_forwards, tree_tokens
from rrhf.losses import LossSettings, rrhf_loss
from rrhf.memory import keep_freed_memory
from rrhf.text import EncodedRecord
from rrhf.trainer import ROOMY
from rrhf.tree import tree_logprobs

PRECISIONS = {
    "fp32": ("float32", False),
    "bf16 autocast": ("float32", True),
    "bf16 weights": ("bfloat16", False),
}


def opponent_step(model: Any, records: list[EncodedRecord]) -> None:
    """Forward and backward as the released code does it."""
    device = model.device
    for record in records:
        width = len(record.query) + max(len(response) for response in record.responses)
        ids = torch.zeros(len(record.responses), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, response in enumerate(record.responses):
            row = torch.tensor([*record.query, *response])
            ids[i, : len(row)] = row
            labels[i, len(record.query) : len(row)] = row[len(record.query) :]
        ids, labels = ids.to(device), labels.to(device)
        mask = (torch.arange(width, device=device)[None] < (labels != -100).sum(1)[:, None] + len(record.query)).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logprobs = torch.log_softmax(logits.float(), dim=-1)[:, :-1]
        targets = labels[:, 1:]
        token = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
        _loss(token.sum(1), (targets != -100).sum(1), record).backward()


def our_step(model: Any, records: list[EncodedRecord], budget: int) -> None:
    """Forward and backward as the trainer does it, slices of large records included."""
    for forward in plan_forwards(records, budget):
        if not forward.slices:
            found = tree_logprobs(model, forward.records, keep_logits=budget >= ROOMY)
            sizes = [len(record.responses) for record in forward.records]
            parts = zip(forward.records, found.sums.split(sizes), found.lengths.split(sizes), strict=True)
            sum(_loss(sums, lengths, record) for record, sums, lengths in parts).backward()
            continue
        with torch.no_grad():
            passes = [tree_logprobs(model, [part]) for part in forward.slices]
        sums = torch.cat([p.sums for p in passes]).requires_grad_()
        (weights,) = torch.autograd.grad(_loss(sums, torch.cat([p.lengths for p in passes]), forward.records[0]), sums)
        for part, weight in zip(forward.slices, weights.split([len(p.responses) for p in forward.slices]), strict=True):
            (tree_logprobs(model, [part]).sums * weight).sum().backward()


def _loss(sums: torch.Tensor, lengths: torch.Tensor, record: EncodedRecord) -> torch.Tensor:
    scores = torch.tensor(record.scores, dtype=torch.float64, device=sums.device)
    return rrhf_loss(sums, lengths, scores, LossSettings()).total


def useful_operations(model: Any, records: list[EncodedRecord]) -> float:
    """6 a parameter outside the embedding for each unique token, 6 of the output layer for each response token."""
    head = model.get_output_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    body -= 0 if tied else head
    unique = sum(tree_tokens(record) for record in records)
    return 6.0 * (body * unique + head * sum(len(y) for record in records for y in record.responses))


def measure(
    side: str, precision: str, budget: int, k: int, queries: int, model_name: str, device: str
) -> dict[str, float]:
    """One row, in this process."""
    if side != "padded":
        keep_freed_memory()
    dtype, autocast = PRECISIONS[precision]
    model, _ = load(model_name, device, dtype)
    _, records = hh_records(queries, k=k)
    model.train()
    product_type = torch.float32 if precision == "fp32" else torch.bfloat16
    peaks = matmul_peak(product_type, model.device), fastest_peak(product_type, model.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        (parameter + parameter.grad).sum()  # weights mapped from a file count once they were read
    floor = memory_gb()

    def context() -> contextlib.AbstractContextManager[Any]:
        if autocast:
            return torch.autocast(model.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def step(part: list[EncodedRecord]) -> None:
        with context():
            our_step(model, part, budget) if side == "tree" else opponent_step(model, part)

    with our_attention(model) if side == "tree" else contextlib.nullcontext():
        took = seconds(lambda: step(records), repeats=2)
        gb, above = peak_gb(), peak_gb() - floor
        tensors = tensors_gb(lambda: step(records))
    rate = useful_operations(model, records) / took / 1e9
    return {
        "queries_per_second": len(records) / took,
        "tokens_per_second": sum(tree_tokens(record) for record in records) / took,
        "gflops": rate,
        "share_of_torch": rate / peaks[0],
        "share_of_fastest": rate / peaks[1],
        "peak_of_torch": peaks[0],
        "peak_of_fastest": peaks[1],
        "gb": gb,
        "gb_above": above,
        "gb_tensors": tensors,
    }


def in_process(*row: Any) -> dict[str, float]:
    """Run ``measure`` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--row", json.dumps(row)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--queries", type=int, default=12)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--row", help="(internal) one row, as JSON")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(*json.loads(options.row))))
        return
    common = (options.model, options.device)
    n = options.queries
    plan: list[tuple[str, str, str, int, int]] = [
        ("padded [k, T], full log-softmax", "padded", precision, 0, 6) for precision in PRECISIONS
    ]
    plan += [
        (f"tree, {options.budget} tokens a forward", "tree", precision, options.budget, 6) for precision in PRECISIONS
    ]
    plan += [("tree, 1024 tokens a forward", "tree", precision, 1024, 6) for precision in PRECISIONS]
    plan += [(f"tree, 1024 tokens, k = {k}", "tree", "fp32", 1024, k) for k in (8, 64)]
    rows, found = [], {}
    for name, side, precision, budget, k in plan:
        few = max(1, n * 6 // k)  # as many responses in each row; the rows of k = 6 have the same records
        result = in_process(side, precision, budget, k, few, *common)
        found[side, precision, budget, k] = result
        rows.append(
            [
                name,
                precision,
                f"{result['queries_per_second']:.2f}",
                f"{result['tokens_per_second']:.0f}",
                f"{100 * result['share_of_torch']:.0f} %",
                f"{100 * result['share_of_fastest']:.0f} %",
                f"{result['gb']:.1f}",
                f"{result['gb_above']:.2f}",
                f"{result['gb_tensors']:.2f}",
            ]
        )
        peaks = f"peaks {result['peak_of_torch']:.0f}, {result['peak_of_fastest']:.0f}"
        print("  ".join([*rows[-1], peaks]), file=sys.stderr, flush=True)
    header = [
        "pass",
        "precision",
        "queries/s",
        "unique tokens/s",
        "of torch's matmul peak",
        "of the fastest product's",
        "peak GB",
        "GB above weights and gradients",
        "GB of tensors above them",
    ]
    best = max(found["padded", p, 0, 6]["queries_per_second"] for p in ("bf16 autocast", "bf16 weights"))
    lines = [
        f"Machine: {machine()}. SmolLM2-135M, HH records, queries up to 128 tokens, k = 6; the faster of 2 runs.",
        "",
        table(header, rows),
        "",
        _ratio("fp32", found, options.budget, found["padded", "fp32", 0, 6]["queries_per_second"]),
        _ratio("bf16 autocast", found, options.budget, best),
        _ratio("bf16 weights", found, options.budget, best),
    ]
    report("\n".join(lines), options.output)


def _ratio(precision: str, found: dict[Any, dict[str, float]], budget: int, opponent: float) -> str:
    ours = found["tree", precision, budget, 6]["queries_per_second"]
    return f"- {precision}: {ours / opponent:.1f}× the opponent's queries/s (its fastest in like precision)"


if __name__ == "__main__":
    main()
