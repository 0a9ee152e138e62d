"""Scoring by a trivial function: seconds and memory of `rrhf score`, against a bare loop over the same file.

The loop is what a script of ten lines would do: parse a line, call the function, write the line; it checks nothing and
starts anew when it is stopped. Both are processes of their own. Peak memory is shown for a tenth of the records too:
it must not grow with them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from common import arguments, machine, report, table

FUNCTION = """
def length(prompts, completions):
    return [float(len(completion)) for completion in completions]
"""

LOOP = """
import json, sys
from trivial import length
with open(sys.argv[1]) as source, open(sys.argv[2], "w") as target:
    for line in source:
        row = json.loads(line)
        prompts = [row["query"]] * len(row["responses"])
        row["scores"] = length(prompts=prompts, completions=row["responses"])
        row["rewards"] = {"trivial:length": row["scores"]}
        target.write(json.dumps(row, ensure_ascii=False) + "\\n")
"""


COMMAND = """
import sys
from rrhf.cli.main import main
assert main(sys.argv[1:]) == 0
"""

TOOK = """
import time
from pathlib import Path
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
print(time.process_time(), peak)
"""


class Run(NamedTuple):
    """Of a process from start to end: seconds on the clock and of the processor, and peak resident memory in MB."""

    wall: float
    processor: float
    peak: float


def write_data(path: Path, count: int, responses: int) -> None:
    """Records with queries of about 200 characters and responses of about 150."""
    draw = random.Random(0)
    words = [
        f"{draw.choice('bcdfgklmnprst')}{draw.choice('aeiou')}{draw.choice(['n', 'rt', 'st', ''])}" for _ in range(900)
    ]
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = {
                "id": f"q{i}",
                "query": " ".join(draw.choices(words, k=50)),
                "responses": [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(responses)],
                "sources": [f"top-p/{j}" for j in range(responses)],
            }
            file.write(json.dumps(row) + "\n")


def run(script: str, arguments: list[str], folder: Path) -> Run:
    """A process of its own runs ``script``; in the end it says itself what it took."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script + TOOK, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    wall = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    processor, peak = map(float, done.stdout.split()[-2:])
    return Run(wall, processor, peak)


def measure(folder: Path, count: int, responses: int) -> dict[str, Run]:
    data = folder / f"data-{count}.jsonl"
    write_data(data, count, responses)
    score = ["score", "--reward", "trivial:length", "--data", str(data), "--output", f"scored-{count}.jsonl"]
    return {
        "a bare loop": run(LOOP, [str(data), f"loop-{count}.jsonl"], folder),
        "rrhf score": run(COMMAND, score, folder),
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=100_000, help="records; a tenth of them is measured too")
    parser.add_argument("--responses", type=int, default=6)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "trivial.py").write_text(FUNCTION, encoding="utf-8")
        for count in (max(options.queries // 10, 1), options.queries):
            found = measure(folder, count, options.responses)
            for name, each in found.items():
                ratio = each.wall / found["a bare loop"].wall
                rows.append(
                    [
                        name,
                        f"{count:,}",
                        f"{each.wall:.1f}",
                        f"{each.processor:.1f}",
                        f"{ratio:.1f}",
                        f"{each.peak:.0f}",
                    ]
                )
    header = ["what", "records", "seconds", "seconds of the processor", "times the loop", "peak MB"]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    report(f"{machine()}; load {load} on {os.cpu_count()} cores\n\n{table(header, rows)}", options.output)


if __name__ == "__main__":
    main()
