"""What a GPU makes of it: Llamas with random weights, k = 6, HH's lengths, bf16 weights.

    train     queries/s, share of the measured bf16 matmul peak and peak memory, forward and backward: the tree by
              FlexAttention and by masked calls of torch's attention, padded rows, and the released code's padded rows
    trainer   records/s of a whole training step, here and in TRL's DPOTrainer (where TRL is installed)
    equal     log-probabilities and gradients of the trees against those of padded rows, all in bf16, and how far both
              are from padded rows in fp32
    sample    tokens/s of top-p and diverse beams here, by transformers' generate, and by vLLM (where it is installed)

Every row is a process of its own: one that fails, or takes longer than --timeout, is noted and the others go on.
Results are JSON lines in --output, and a table at the end; it exits with 1 where a row failed or trees and rows were
not equal. It has not run on a GPU yet (docs/benchmarks.md). To try the script without one, where trees go by branches:

    python benchmarks/gpu.py --device cpu --model random:tiny --queries 2 --new_tokens 8 --budget 1024 --batches 2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dpo
import sampling
import training
from common import arguments, data_name, hh_records, load, machine, memory_gb, peak_gb, seconds, table
from rrhf.models.devices import resolve_device
from rrhf.models.kernels.choice import ask_for_flex
from rrhf.models.passes import response_logprobs
from rrhf.models.tokenization import EncodedRecord

# In bf16 a pass rounds in other places than another: how far two may be apart. p is in nats a token, a gradient's
# difference is relative to its norm, over all parameters together.
P_BOUND, GRADIENT_BOUND = 0.02, 0.05


@dataclass(frozen=True)
class Job:
    """One row for one model, with the sizes of the run."""

    row: str
    model: str
    device: str
    queries: int
    budget: int
    new_tokens: int
    batches: tuple[int, ...]


class UnavailableError(Exception):
    """Why a row cannot be had on this machine."""


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"{package} is not installed")


def needs_cuda(device: str) -> None:
    if resolve_device(device).type != "cuda":
        raise UnavailableError("FlexAttention has no backward pass without a CUDA GPU")


# --- training


def train(side: str, job: Job) -> dict[str, Any]:
    if side == "flex":
        needs_cuda(job.device)
    result = training.measure(side, "bf16 weights", job.budget, 6, job.queries, job.model, job.device)
    names = ("queries_per_second", "tokens_per_second", "gflops", "share_of_torch", "peak_of_torch", "gb", "gb_tensors")
    return {name: result[name] for name in names}


def trainer(side: str, job: Job) -> dict[str, Any]:
    if side != "rrhf":
        needs("trl")
    return dpo.measure(side, job.model, job.device, batch=min(4, job.queries), steps=4)


# --- equality


def p_and_gradients(model: Any, records: list[EncodedRecord], path: str) -> tuple[Tensor, list[Tensor]]:
    """p [R] and the gradients of Σ w_i p_i, with a weight w_i of its own for each."""
    model.zero_grad(set_to_none=True)
    parts = []
    for record in records:
        result = response_logprobs(model, [record], path)
        p = result.sums / result.lengths.clamp(min=1)
        (p * torch.linspace(-1, 2, len(p), device=p.device)).sum().div(len(records)).backward()
        parts.append(p.detach())
    return torch.cat(parts), [x.grad.detach().clone() for x in model.parameters() if x.grad is not None]


def relative(gradients: list[Tensor], others: list[Tensor]) -> float:
    """‖g − g'‖ / ‖g'‖ over all parameters together."""
    pairs = list(zip(gradients, others, strict=True))
    apart = sum(float((a.float() - b.float()).norm()) ** 2 for a, b in pairs)
    return float((apart / sum(float(b.float().norm()) ** 2 for _, b in pairs)) ** 0.5)


def equal(side: str, job: Job) -> dict[str, Any]:
    if side == "flex":
        needs_cuda(job.device)
    model, _ = load(job.model, job.device, "float32")
    _, records = hh_records(min(job.queries, 8), k=6)
    exact, exact_gradients = p_and_gradients(model, records, "padded")
    model = model.to(torch.bfloat16)
    rows, row_gradients = p_and_gradients(model, records, "padded")
    if side == "flex":
        ask_for_flex(model)
    trees, tree_gradients = p_and_gradients(model, records, "tree")
    apart, gradients_apart = float((trees - rows).abs().max()), relative(tree_gradients, row_gradients)
    return {
        "p_apart": apart,
        "p_bound": P_BOUND,
        "gradients_apart": gradients_apart,
        "gradient_bound": GRADIENT_BOUND,
        "equal": apart <= P_BOUND and gradients_apart <= GRADIENT_BOUND,
        "p_error_of_trees": float((trees - exact).abs().max()),
        "p_error_of_rows": float((rows - exact).abs().max()),
        "gradient_error_of_trees": relative(tree_gradients, exact_gradients),
        "gradient_error_of_rows": relative(row_gradients, exact_gradients),
    }


# --- sampling


def sample(policy: str, side: str, job: Job) -> dict[str, Any]:
    if side == "vllm":
        needs("vllm")
    model, tokenizer = load(job.model, job.device, "bfloat16")
    _, records = hh_records(job.queries, k=2)
    queries = sorted((list(record.query) for record in records), key=len, reverse=True)
    took: dict[int, float] = {}
    memory_gb()
    if side == "vllm":
        took[len(queries)] = by_vllm(model, tokenizer, queries, job.new_tokens)  # it makes its batches by itself
    for batch in job.batches if side != "vllm" else ():
        if side == "rrhf":
            took[batch] = sampling.ours(model, tokenizer, queries, policy, job.new_tokens, batch)
        else:
            took[batch] = sampling.theirs(model, queries, policy, job.new_tokens, batch)
    best = min(took, key=lambda batch: took[batch])
    return {"tokens_per_second": len(queries) * 4 * job.new_tokens / took[best], "batch": best, "gb": peak_gb()}


def by_vllm(model: Any, tokenizer: Any, queries: list[list[int]], new_tokens: int) -> float:
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.to("meta")  # its memory is vLLM's now
        engine = LLM(model=folder, dtype="bfloat16", max_model_len=128 + new_tokens)
    params = SamplingParams(n=4, temperature=0.8, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True)

    def run(part: list[list[int]]) -> None:
        engine.generate([{"prompt_token_ids": query} for query in part], params, use_tqdm=False)

    run(queries[:2])
    return seconds(lambda: run(queries))


ROWS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "train: tree by FlexAttention": lambda job: train("flex", job),
    "train: tree by masked calls": lambda job: train("tree", job),
    "train: padded rows": lambda job: train("rows", job),
    "train: padded rows, full log-softmax": lambda job: train("padded", job),
    "trainer: rrhf": lambda job: trainer("rrhf", job),
    "trainer: TRL's DPO": lambda job: trainer("dpo", job),
    "trainer: TRL's DPO, precomputed": lambda job: trainer("dpo, precomputed", job),
    "equal: tree by FlexAttention": lambda job: equal("flex", job),
    "equal: tree by masked calls": lambda job: equal("tree", job),
    "sample: top-p, rrhf": lambda job: sample("top-p", "rrhf", job),
    "sample: top-p, generate": lambda job: sample("top-p", "generate", job),
    "sample: top-p, vLLM": lambda job: sample("top-p", "vllm", job),
    "sample: diverse-beam, rrhf": lambda job: sample("diverse-beam", "rrhf", job),
    "sample: diverse-beam, generate with plain beams": lambda job: sample("diverse-beam", "generate", job),
}


# --- rows in processes of their own


def one_row(job: Job) -> dict[str, Any]:
    """In this process."""
    try:
        return {"status": "done", **ROWS[job.row](job)}
    except UnavailableError as why:
        return {"status": "skipped", "why": str(why)}


def in_process(job: Job, timeout: float) -> dict[str, Any]:
    """``one_row`` in a process of its own, whatever becomes of it."""
    command = [sys.executable, __file__, "--row", json.dumps(asdict(job))]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        result: dict[str, Any] = {"status": "failed", "why": f"not done after {timeout:.0f} s"}
    else:
        if done.returncode:
            result = {"status": "failed", "why": done.stderr[-2000:]}
        else:
            result = json.loads(done.stdout.splitlines()[-1])
    return {**asdict(job), **result, "seconds": round(time.perf_counter() - begin, 1)}


def shown(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    named = asdict(Job("", "", "", 0, 0, 0, ()))
    numbers = {name: value for name, value in result.items() if name not in {*named, "status", "why", "seconds"}}
    if result["status"] != "done":
        text = f"{result['status']}: {(result['why'].splitlines() or ['killed'])[-1]}"
    else:
        text = ", ".join(
            f"{name} {value:.4g}" if type(value) is float else f"{name} {value}" for name, value in numbers.items()
        )
    return [result["row"], result["model"], text]


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(model=None, output="gpu.jsonl")
    parser.add_argument("--models", nargs="+", default=["random:135m", "random:1b"], help="where --model names none")
    parser.add_argument("--rows", nargs="+", help="only rows that begin so, such as train or 'sample: top-p'")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--budget", type=int, default=16_384, help="tokens a forward")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64], help="queries a batch in sampling")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a row may take")
    parser.add_argument("--row", help="(internal) one row, as JSON")
    return parser.parse_args()


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    for model in [options.model] if options.model else options.models:
        for row in ROWS:
            if options.rows is None or row.startswith(tuple(options.rows)):
                yield Job(
                    row, model, options.device, options.queries, options.budget, options.new_tokens,
                    tuple(options.batches),
                )  # fmt: skip


def main() -> None:
    options = parsed()
    if options.row:
        job = Job(**json.loads(options.row))
        print(json.dumps(one_row(job)))
        return
    lines, faults = [], 0
    with Path(options.output).open("a", encoding="utf-8") as file:
        for job in jobs(options):
            result = {"machine": machine(), **in_process(job, options.timeout)}
            file.write(json.dumps(result) + "\n")
            file.flush()
            del result["machine"]
            faults += result["status"] == "failed" or result.get("equal") is False
            lines.append(shown(result))
            print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
    print(f"Machine: {machine()}. {options.queries} {data_name()}, k = 6, bf16 weights.\n")
    print(table(["row", "model", "numbers"], lines))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
