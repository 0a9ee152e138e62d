"""Break the code that recovers, one place after the other, and see that a test of faults fails each time.

``make test-mutations``. It works on a copy of the package, so nothing here is changed. Exit code 1 where a broken place
went unseen, or the tests do not pass as they are. docs/faults.md has what came of it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = "tests/faults/test_faults.py::test_nothing_is_lost"
PARTS = "tests/records/test_parts.py"
PATIENCE = 1200  # seconds for a test, which may wait for ever where a place is broken


@dataclass(frozen=True)
class Mutation:
    """What is broken, where, how, and the test that is expected to see it."""

    what: str
    file: str
    before: str
    after: str
    test: str


MUTATIONS = [
    Mutation(
        "a damaged part is taken as it is",
        "records/parts_folder.py",
        "if not path.exists() or checksum_of_file(path) != entry.sha256:",
        "if not path.exists():",
        f"{PARTS}::test_a_damaged_part_is_done_again",
    ),
    Mutation(
        "parts of other input are taken",
        "records/parts_folder.py",
        "if entry is None or entry.input != origin:",
        "if entry is None:",
        f"{PARTS}::test_parts_of_other_input_are_done_again",
    ),
    Mutation(
        "a file is written in its place at once",
        "common/files.py",
        "    temporary = _temporary(path, os.getpid())\n    try:",
        "    yield path\n    return\n    try:",
        "tests/common/test_files.py::test_after_any_exception_the_old_file_stands",
    ),
    Mutation(
        "a damaged checkpoint is gone on from",
        "training/folder.py",
        "return not check or _is_sound(checkpoint)",
        "return True",
        "tests/fuzz/test_fuzz.py::test_damaged_checkpoints",
    ),
    Mutation(
        "a second run is let in",
        "common/locks.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        f"{FAULTS}[second run-train]",
    ),
    Mutation(
        "out of memory ends the command",
        "models/out_of_memory.py",
        "        if not is_out_of_memory(error):\n            raise",
        "        raise",
        "tests/faults/test_memory.py::test_every_record_passes_once_and_the_limit_stays",
    ),
    Mutation(
        "a step that ran out of memory keeps the gradients of its first half",
        "training/trainer.py",
        "            model.zero_grad()\n            random.restore(device)",
        "            random.restore(device)",
        "tests/faults/test_memory.py::test_half_at_a_time_gives_the_same[train]",
    ),
    Mutation(
        "a gradient that is no number is used",
        "training/trainer.py",
        "if not math.isfinite(float(norm)) and self.accelerator.scaler is None:",
        "if False:",
        f"{FAULTS}[NaN-train]",
    ),
    Mutation(
        "a signal ends training without a checkpoint, and as if all were done",
        "training/callbacks.py",
        "control.should_save = control.should_training_stop = True",
        "control.should_training_stop = False",
        "tests/recipes/test_run.py::test_a_signal_during_training_keeps_every_step",
    ),
    Mutation(
        "a torn line of a journal ends the command",
        "common/journal.py",
        "            except (ValueError, RecursionError):\n                continue",
        "            except RecursionError:\n                continue",
        "tests/fuzz/test_fuzz.py::test_damaged_journals",
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutations")
    options = parser.parse_args()
    unseen = 0
    for number, mutation in enumerate(MUTATIONS):
        if options.only and number not in options.only:
            continue
        with tempfile.TemporaryDirectory() as place:
            shutil.copytree(ROOT / "src", Path(place, "src"))
            whole = _passes(Path(place, "src"), mutation.test)
            file = Path(place, "src", "rrhf", mutation.file)
            text = file.read_text(encoding="utf-8")
            assert mutation.before in text, f"{mutation.file} has changed: {mutation.before!r} is not in it"
            file.write_text(text.replace(mutation.before, mutation.after, 1), encoding="utf-8")
            seen = not _passes(Path(place, "src"), mutation.test)
        unseen += not (whole and seen)
        said = "seen" if whole and seen else "NOT SEEN" if whole else "the test fails without it"
        print(f"{number}. {mutation.what} ({mutation.file}): {said} by {mutation.test}", flush=True)
    return 1 if unseen else 0


def _passes(source: Path, test: str) -> bool:
    path, _, names = test.partition("::")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"{path}::{names}"]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    try:
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        print(f"{test}: no end in {PATIENCE} seconds", flush=True)
        return False
    return ended.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
