"""Freed memory is kept for the next allocation."""

from __future__ import annotations

import resource
import subprocess
import sys

SCRIPT = """
import resource, sys, torch
from rrhf.models.kernels.cpu.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.full((2**24,), 1.0)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_large_blocks_are_not_given_back_and_fetched_anew() -> None:
    found = {}
    for mode in ("keep", "plain"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
        found[mode] = int(done.stdout)
    whole = 20 * 2**26 // resource.getpagesize()
    assert found["keep"] < whole / 100
    assert found["plain"] > whole / 100  # what there was to save (huge pages would make it less than one a page)
