"""Training: records a second, share of the matmul peak and peak memory, against padded rows with a full log-softmax.

Each row runs in a process of its own, so that peak memory is its own. The opponent is how the released code does it:
one query a forward, its k responses padded to [k, T], the log-softmax of all positions at once; in bf16 the faster of
autocast and bf16 weights counts. The rows are run in turn, round after round, because machines have slow moments.

"Products alone" replays the matrix products of the tree pass, with other operands and nothing between them: what would
be left of its time if all else were free.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import (
    arguments,
    data_name,
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
from rrhf.losses import LossSettings, rrhf_loss
from rrhf.models.attention import our_attention
from rrhf.models.batching import plan_forwards, tree_tokens
from rrhf.models.kernels.choice import ask_for_flex
from rrhf.models.kernels.cpu.memory import keep_freed_memory
from rrhf.models.passes import response_logprobs
from rrhf.models.tokenization import EncodedRecord

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


def our_step(model: Any, records: list[EncodedRecord], budget: int, path: str = "tree") -> None:
    """Forward and backward as the trainer does it, slices of large records included."""
    for forward in plan_forwards(records, budget, path):
        if not forward.slices:
            found = response_logprobs(model, forward.records, path, keep_logits=budget >= 2048)
            sizes = [len(record.responses) for record in forward.records]
            parts = zip(forward.records, found.sums.split(sizes), found.lengths.split(sizes), strict=True)
            sum(_loss(sums, lengths, record) for record, sums, lengths in parts).backward()
            continue
        with torch.no_grad():
            passes = [response_logprobs(model, [part], path) for part in forward.slices]
        sums = torch.cat([p.sums for p in passes]).requires_grad_()
        (weights,) = torch.autograd.grad(_loss(sums, torch.cat([p.lengths for p in passes]), forward.records[0]), sums)
        for part, weight in zip(forward.slices, weights.split([len(p.responses) for p in forward.slices]), strict=True):
            (response_logprobs(model, [part], path).sums * weight).sum().backward()


class _Products(TorchDispatchMode):
    """Records the matrix products that are made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] in ("mm", "bmm", "addmm", "linear", "_linear_pointwise"):
            lie = torch.utils._pytree.tree_map_only(torch.Tensor, _lie, args)
            out = (kwargs or {}).get("out")
            self.calls.append((func, lie, None if out is None else _lie(out)))
        return result


def _lie(x: torch.Tensor) -> tuple[Any, ...]:
    """How a tensor lies in memory."""
    return x.shape, x.stride(), x.dtype, x.device


def products_alone(step: Callable[[], Any]) -> float:
    """Seconds of the products of ``step``, replayed with operands that take turns, so that they come from memory."""
    with _Products() as recorded:
        step()
    pools: dict[Any, Any] = {}

    def operand(lie: Any) -> torch.Tensor:
        if lie not in pools:
            shape, stride, dtype, device = lie
            made = [torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_() for _ in range(8)]
            pools[lie] = itertools.cycle(made)
        tensor: torch.Tensor = next(pools[lie])
        return tensor

    def is_lie(value: Any) -> bool:
        return isinstance(value, tuple) and len(value) == 4 and isinstance(value[0], torch.Size)

    calls = []
    for func, lies, out in recorded.calls:
        args = [operand(value) if is_lie(value) else value for value in lies]
        calls.append((func, args, {} if out is None else {"out": operand(out)}))

    def replay() -> None:
        for func, args, kwargs in calls:
            func(*args, **kwargs)

    with torch.no_grad():
        replay()
        return seconds(replay, repeats=2)


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
    """One row, in this process.

    ``side``: "padded" as the released code does it, "tree" and its "products" alone; for ``gpu.py`` "flex", the
    tree by FlexAttention, and "rows", the log-probabilities of padded rows as rrhf computes them.
    """
    if side != "padded":
        keep_freed_memory()
    dtype, autocast = PRECISIONS[precision]
    model, _ = load(model_name, device, dtype)
    if side == "flex":
        ask_for_flex(model)
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
            if side == "padded":
                opponent_step(model, part)
            else:
                our_step(model, part, budget, "padded" if side == "rows" else "tree")

    with our_attention(model) if side not in ("padded", "rows") else contextlib.nullcontext():
        if side == "products":
            took, gb, above, tensors = products_alone(lambda: step(records)), 0.0, 0.0, 0.0
        else:
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
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", action="append", choices=[*PRECISIONS], help="only these rows")
    parser.add_argument("--row", help="(internal) one row, as JSON")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(*json.loads(options.row))))
        return
    plan: list[tuple[str, str, str, int, int]] = [
        ("padded [k, T], full log-softmax", "padded", precision, 0, 6) for precision in PRECISIONS
    ]
    for budget in (4096, 2048, 1024):
        plan += [(f"tree, {budget} tokens a forward", "tree", precision, budget, 6) for precision in PRECISIONS]
    plan += [
        ("products alone of 2048 tokens", "products", precision, 2048, 6) for precision in ("fp32", "bf16 weights")
    ]
    plan += [(f"tree, 1024 tokens, k = {k}", "tree", "fp32", 1024, k) for k in (8, 64)]
    plan = [row for row in plan if row[2] in (options.precision or PRECISIONS)]
    found: dict[Any, list[dict[str, float]]] = {}
    for turn in range(options.rounds):
        for name, side, precision, budget, k in plan:
            few = max(1, options.queries * 6 // k)  # as many responses in each row; rows of k = 6 have the same records
            result = in_process(side, precision, budget, k, few, options.model, options.device)
            found.setdefault((side, precision, budget, k), []).append(result)
            shown = {key: round(value, 2) for key, value in result.items()}
            print(turn, name, precision, shown, file=sys.stderr, flush=True)
    rows = [[row[0], *_line(row[2], found[row[1:]])] for row in plan]
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
    lines = [
        f"Machine: {machine()}. {options.queries} {data_name()}, queries up to 128 tokens, k = 6; medians of "
        f"{options.rounds} rounds, each the faster of 2 runs; in brackets the lowest and highest.",
        "",
        table(header, rows),
        "",
    ]
    for side, precision, budget, k in found:
        if side == "tree" and k == 6:
            lines.append(_ratio(precision, budget, found))
    report("\n".join(lines), options.output)


def _line(precision: str, results: list[dict[str, float]]) -> list[str]:
    def middle(key: str) -> float:
        return statistics.median(result[key] for result in results)

    rates = [result["queries_per_second"] for result in results]
    return [
        precision,
        f"{middle('queries_per_second'):.2f} ({min(rates):.2f}–{max(rates):.2f})",
        f"{middle('tokens_per_second'):.0f}",
        f"{100 * middle('share_of_torch'):.0f} %",
        f"{100 * middle('share_of_fastest'):.0f} %",
        *(f"{middle(key):.2f}" for key in ("gb", "gb_above", "gb_tensors")),
    ]


def _ratio(precision: str, budget: int, found: dict[Any, list[dict[str, float]]]) -> str:
    """The tree pass against the opponent's faster pass in like precision, round by round."""
    others = ("fp32",) if precision == "fp32" else ("bf16 autocast", "bf16 weights")
    passes = [found["padded", other, 0, 6] for other in others if ("padded", other, 0, 6) in found]  # --precision
    rounds = zip(found["tree", precision, budget, 6], *passes, strict=True)
    rates = [[result["queries_per_second"] for result in results] for results in rounds]
    ratios = [ours / max(theirs) for ours, *theirs in rates]
    return (
        f"- {precision}, {budget} tokens a forward: {statistics.median(ratios):.1f}× the opponent's queries/s "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    )


if __name__ == "__main__":
    main()
