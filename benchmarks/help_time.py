"""How long `rrhf --help` takes, against a Python that does nothing: `python benchmarks/help_time.py`.

They alternate. The clock's time is shown and the processor's: on a busy machine the clock measures the others too.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ASKED = 0.5  # seconds
COMMANDS = ("--help", "sample --help", "run --help", "train --help")


def measure(command: Sequence[str]) -> tuple[float, float]:
    """(seconds on the clock, seconds of the processor) of a process."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    took, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    script = Path(sys.executable).with_name("rrhf")  # as people start it
    start = [str(script)] if script.exists() else [sys.executable, "-m", "rrhf.cli"]
    rows = {"python -c pass": [sys.executable, "-c", "pass"]}
    rows |= {f"rrhf {command}": [*start, *command.split()] for command in COMMANDS}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(rounds + 1):
        for name, command in rows.items():
            found[name].append(measure(command))
    medians = {name: [statistics.median(column) for column in zip(*times[1:])] for name, times in found.items()}
    base = medians["python -c pass"]
    print(f"{rounds} rounds; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; medians in seconds\n")
    print("| command | clock | processor | times python -c pass (processor) |\n| --- | --- | --- | --- |")
    for name, (clock, processor) in medians.items():
        print(f"| `{name}` | {clock:.3f} | {processor:.3f} | {processor / base[1]:.1f} |")
    fastest = min(clock for clock, _ in found["rrhf --help"][1:])
    print(f"\nrrhf --help: {medians['rrhf --help'][0]:.3f} s, at its fastest {fastest:.3f} s; asked: under {ASKED} s")


if __name__ == "__main__":
    main()
