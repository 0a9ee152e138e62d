"""On what something was computed: the versions of the libraries, the code, the machine. No name of host or user."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "numpy", "vllm", "openvino-genai", "ray",
)  # fmt: skip


def environment() -> dict[str, dict[str, Any]]:
    """``versions`` (of rrhf, Python and those of ``LIBRARIES`` that are installed) and ``machine``.

    ``machine`` has ``system``, ``processor``, ``cores``, ``memory_bytes`` and, where torch sees them, ``accelerators``;
    what cannot be found out is left out.
    """
    versions = {"rrhf": commit(), "Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "accelerators": _accelerators(),
    }
    return {"versions": versions, "machine": {name: value for name, value in machine.items() if value}}


@cache
def commit() -> str:
    """What ``git describe`` says of this code; the package's version where it stands in no repository of its own."""
    from rrhf import __version__

    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # A package in a virtual environment lies in the repository of somebody else's project.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)  # nosec B607
        told = subprocess.run(  # nosec B607 # git, as the user has it
            [*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return told.stdout.strip() or __version__


def _processor() -> str | None:
    """The processor's name, with the vector instructions that make a run fast or slow."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    found = dict(line.replace("\t", "").split(":", 1) for line in reversed(lines) if ":" in line)
    name = found.get("model name", "").strip() or platform.processor()
    flags = found.get("flags", "").split()
    shown = {"avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
    best = next((label for flag, label in shown.items() if flag in flags), None)
    return ", ".join(part for part in (name, best) if part) or None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _accelerators() -> Sequence[str]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
