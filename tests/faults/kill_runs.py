"""Kill a run at random moments until it comes to its end, and compare it with one that nothing disturbed.

``make test-faults``. Each of the runs (20 unless a number is given) samples, scores, trains and evaluates a tiny random
model and is killed with SIGKILL, at moments drawn from its seed, at one of the lines that the project's own code
executes: in the middle of a batch, a write, a rename, a checkpoint. The command is given again until it ends with 0.
Then every record, weight and number must be that of the undisturbed run, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from recipes.test_run import RESULTS, RUN, SMALL_PARTS, left_over
from support import tiny

MOST_ATTEMPTS = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="?", type=int, default=20, help="how many runs are killed until they end")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next one has the next")
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        model = tiny.write_model(Path(place) / "model")
        whole = tiny.workplace(Path(place) / "undisturbed", tiny.config(model))
        counted = Path(place) / "moments"
        tiny.warm(*RUN, cwd=whole, faults=[SMALL_PARTS, {"at": "rrhf:", "lines": str(counted)}]).done()
        moments = int(counted.read_text())
        print(f"an undisturbed run has {moments} moments to die at", flush=True)
        for seed in range(options.seed, options.seed + options.runs):
            folder = tiny.workplace(Path(place) / str(seed), tiny.config(model))
            began = time.monotonic()
            killed, faults = until_the_end(folder, random.Random(seed), moments)
            faults += differences(folder, whole)
            bad += bool(faults)
            seconds = time.monotonic() - began
            print(f"seed {seed}: killed {killed} times, {seconds:.0f} s: {'; '.join(faults) or 'the same'}", flush=True)
            shutil.rmtree(folder)
    print(f"{options.runs - bad} of {options.runs} runs came to the undisturbed one's result")
    return 1 if bad else 0


def until_the_end(folder: Path, draw: random.Random, moments: int) -> tuple[int, list[str]]:
    """Run until the exit code is 0; how often it was killed, and what went wrong on the way.

    Moments are drawn on a logarithmic scale, so that early ones and late ones are met alike.
    """
    for killed in range(MOST_ATTEMPTS):
        moment = int(moments ** draw.uniform(0.5, 1.0))
        result = tiny.warm(*RUN, cwd=folder, faults=[SMALL_PARTS, {"at": "rrhf:", "line": moment}])
        if result.code == 0:
            return killed, []
        if result.code != -signal.SIGKILL:
            return killed, [f"exit code {result.code}: {result.err[-2000:]}"]
    tiny.warm(*RUN, cwd=folder, faults=[SMALL_PARTS]).done()
    return MOST_ATTEMPTS, []


def differences(folder: Path, whole: Path) -> list[str]:
    found = []
    for name in RESULTS:
        mine, other = folder / "run" / name, whole / "run" / name
        if not mine.exists() or mine.read_bytes() != other.read_bytes():
            found.append(f"{name} differs")
    rows = tiny.read_rows(folder / "run/scored.jsonl") if (folder / "run/scored.jsonl").exists() else []
    if [row["id"] for row in rows] != [f"q{i}" for i in range(9, 29)]:
        found.append("records are lost or twice")
    if (timings := folder / "run/timings.json").exists() and "report" not in json.loads(timings.read_text()):
        found.append("timings.json is not complete")
    return found + [f"left over: {path}" for path in left_over(folder)]


if __name__ == "__main__":
    sys.exit(main())
