"""Sampling: tokens a second against transformers' ``generate``, each side at its best batch size, in one run.

Diverse beam is held against the group beam search of transformers 4.46 where ``--old PYTHON`` names an interpreter that
has it (``make bench`` makes one), else against ``generate`` with as many plain beams. ``--openvino FOLDER`` holds all
policies against OpenVINO GenAI instead, by ``.venv-openvino`` (``make openvino-env``), on a model that it has converted
(docs/sources.md): with its cache of 8 bits, and with one of the type that it computes in.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from common import (
    arguments,
    data_name,
    hh_records,
    load,
    machine,
    matmul_peak,
    memory_gb,
    peak_gb,
    report,
    seconds,
    table,
)
from rrhf.models.kernels.cpu.memory import keep_freed_memory
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings

POLICIES: dict[str, dict[str, Any]] = {
    "top-p": {"policy": "top-p", "num_responses": 4, "temperature": 0.8},
    "beam": {"policy": "beam", "num_beams": 4},
    "diverse-beam": {"policy": "diverse-beam", "num_beams": 4},
}
GENERATE: dict[str, dict[str, Any]] = {
    "top-p": {"do_sample": True, "num_return_sequences": 4, "temperature": 0.8, "top_k": 0, "top_p": 1.0},
    "beam": {"do_sample": False, "num_beams": 4, "num_return_sequences": 4},
    "diverse-beam": {"do_sample": False, "num_beams": 4, "num_return_sequences": 4},
}
OLD = {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.0, "num_return_sequences": 4, "do_sample": False}

OLD_SCRIPT = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
folder, dtype, new_tokens, batch, options = json.loads(sys.argv[1])
queries = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).eval()
def run(part):
    width = max(map(len, part))
    ids = torch.zeros(len(part), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, query in enumerate(part):
        ids[i, width - len(query):] = torch.tensor(query)
        mask[i, width - len(query):] = 1
    with torch.inference_mode():
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                       pad_token_id=0, **options)
run(queries[:2])
begin = time.perf_counter()
for start in range(0, len(queries), batch):
    run(queries[start:start + batch])
print(time.perf_counter() - begin)
"""


def ours(model: Any, tokenizer: Any, queries: list[list[int]], policy: str, new_tokens: int, batch: int) -> float:
    """Seconds to draw 4 responses of exactly ``new_tokens`` tokens to each query."""
    settings = SamplingSettings(max_new_tokens=new_tokens, batch_size=batch, **POLICIES[policy])
    sampler = Sampler(model, tokenizer, settings)

    def run(part: list[list[int]]) -> None:
        sampler.draw(part, [str(i) for i in range(len(part))], [set() for _ in part])

    run(queries[:2])
    return seconds(lambda: [run(queries[i : i + batch]) for i in range(0, len(queries), batch)])


def theirs(model: Any, queries: list[list[int]], policy: str, new_tokens: int, batch: int) -> float:
    """The same by ``generate``, prompts of like length together, padded on the left."""

    def run(part: list[list[int]]) -> None:
        width = max(map(len, part))
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, query in enumerate(part):
            ids[i, width - len(query) :] = torch.tensor(query)
            mask[i, width - len(query) :] = 1
        with torch.inference_mode():
            model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,
                **GENERATE[policy],
            )

    run(queries[:2])
    return seconds(lambda: [run(queries[i : i + batch]) for i in range(0, len(queries), batch)])


def old(python: str, folder: str, queries: list[list[int]], dtype: str, new_tokens: int, batch: int) -> float:
    """Group beam search of transformers 4.46, in the interpreter that has it."""
    options = json.dumps([folder, dtype, new_tokens, batch, OLD])
    done = subprocess.run(
        [python, "-c", OLD_SCRIPT, options], input=json.dumps(queries), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def openvino(options: Any, queries: list[list[int]], policy: str, dtype: str, batch: int, cache: str) -> float:
    """OpenVINO GenAI's continuous batching, in the interpreter that has it."""
    properties = {"INFERENCE_PRECISION_HINT": PRECISION[dtype], "KV_CACHE_PRECISION": cache}
    job = {
        "folder": options.openvino, "queries": queries, "policy": policy, "new_tokens": options.new_tokens,
        "sequences": batch * 4, "options": properties,
    }  # fmt: skip
    script = Path(__file__).with_name("openvino_rival.py")
    command = [options.openvino_python, str(script)]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def rivals(options: Any, queries: list[list[int]], dtype: str, policy: str, model: Any) -> dict[str, dict[int, float]]:
    """Name → batch size → seconds, of those that this policy is held against."""
    batches = options.other_batches
    if options.openvino:
        return {
            f"OpenVINO GenAI, {cache} cache": {b: openvino(options, queries, policy, dtype, b, cache) for b in batches}
            for cache in ("u8", PRECISION[dtype])
        }
    if policy == "diverse-beam" and options.old:
        folder, tokens = model.config._name_or_path, options.new_tokens
        found = {b: old(options.old, folder, queries, dtype, tokens, b) for b in batches}
        return {"group beam search of transformers 4.46": found}
    name = "generate" + (", 4 plain beams" if policy == "diverse-beam" else "")
    return {name: {b: theirs(model, queries, policy, options.new_tokens, b) for b in batches}}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--other_batches", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--old", help="a Python with transformers 4.46, for diverse beam")
    parser.add_argument("--openvino", help="a model that optimum-intel has converted: the rival is OpenVINO GenAI")
    parser.add_argument("--openvino_python", default=".venv-openvino/bin/python")
    options = parser.parse_args()
    _, records = hh_records(options.queries, k=2)
    queries = sorted((list(record.query) for record in records), key=len, reverse=True)
    rows, lines = [], [f"Machine: {machine()}."]
    tokens = len(queries) * 4 * options.new_tokens
    memory_gb()
    plan = [(dtype, policy) for dtype in options.dtypes for policy in options.policies]
    others: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    # All others first: what the command line does for its own process (kernels/cpu/memory.py) is not theirs.
    for dtype, policy in plan:
        model, tokenizer = load(options.model, options.device, dtype)
        others[dtype, policy] = rivals(options, queries, dtype, policy, model)
        print(dtype, policy, others[dtype, policy], file=sys.stderr, flush=True)
    peaks = [peak_gb()]
    keep_freed_memory()
    for dtype, policy in plan:
        model, tokenizer = load(options.model, options.device, dtype)
        if policy == options.policies[0]:
            lines.append(f"Matmul peak in {dtype}: {matmul_peak(getattr(torch, dtype), model.device):.0f} GFLOP/s.")
        found = {b: ours(model, tokenizer, queries, policy, options.new_tokens, b) for b in options.batches}
        best = min(found, key=lambda b: found[b])
        for name, other in others[dtype, policy].items():
            opponent = min(other, key=lambda b: other[b])
            rows.append(
                [
                    policy,
                    dtype,
                    f"{tokens / found[best]:.0f} (batch {best})",
                    f"{tokens / other[opponent]:.0f} (batch {opponent})",
                    f"{other[opponent] / found[best]:.2f}×",
                    name,
                ]
            )
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    peaks.append(peak_gb())
    lines += [
        f"Peak memory: {peaks[0]:.1f} GB up to the end of the others' runs, {peaks[1]:.1f} GB in all.",
        f"Queries of {len(queries)} {data_name()}, up to 128 tokens, 4 responses each, {options.new_tokens} tokens.",
        "",
        table(["policy", "type", "rrhf tok/s", "other tok/s", "ratio", "other"], rows),
    ]
    report("\n".join(lines), options.output)


if __name__ == "__main__":
    main()
