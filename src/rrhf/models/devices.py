"""Which device and which type of weights."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rrhf.common.errors import UserError
from rrhf.common.launch import asks_for_fsdp
from rrhf.models.kernels.cpu.memory import keep_freed_memory

if TYPE_CHECKING:
    import torch

LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")  # in /dev: NVIDIA's, AMD's, and WSL's


def set_up_memory(
    arguments: Sequence[str], environment: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> None:
    """How this process holds memory, said before torch is imported.

    On a CPU the C library keeps what is freed. On a GPU torch's allocator makes segments that grow: batches of ever
    other lengths would leave unusable gaps between fixed ones. A user's own setting stays.

    Args:
        arguments: the command's; ``--device cpu`` is looked for.
    """
    text = " ".join(arguments).replace("=", " ")
    hidden = environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if "--device cpu" in text or hidden or not any(any(devices.glob(pattern)) for pattern in GPU_FILES):
        keep_freed_memory()
    elif sys.platform.startswith("linux") and not any(name in environment for name in ALLOCATOR):
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        limited = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
        if limited and not ("BF16" in limited or "AMX" in limited or limited in ("ALL", "DEFAULT")):
            return False
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def device_name(flag: str, environment: Mapping[str, str], gpus: int, mps: bool) -> str:
    """The device of this process: every process of a launch has a GPU of its own.

    Args:
        flag: ``--device``. ``auto`` is CUDA, then MPS, then the CPU; ``cuda`` the GPU of this process.
        environment: a launcher says in ``LOCAL_RANK`` which process of this machine this one is.
        gpus: CUDA devices that this process sees.
        mps: whether MPS is there.

    Raises:
        UserError: there is no such GPU, or too few for the processes, or one GPU is named for several processes.
    """
    if flag == "auto" and not gpus:
        return "mps" if mps else "cpu"
    if flag != "auto" and flag.partition(":")[0] != "cuda":
        return flag
    if not gpus:
        raise UserError(f"--device {flag}: torch sees no CUDA GPU here; use cpu, cuda, mps or auto")
    rank = _local_rank(environment)
    mine = 0 if gpus == 1 else rank or 0  # a launcher may show each process its own GPU alone
    if mine >= gpus:
        raise UserError(
            f"--device {flag}: process {mine} of this machine has no GPU of its own, {gpus} are here: start {gpus} "
            "processes (torchrun --nproc_per_node), or give --device cpu"
        )
    index = flag.partition(":")[2]
    if flag in ("auto", "cuda"):
        return f"cuda:{mine}"
    if not index.isdecimal() or int(index) >= gpus:
        raise UserError(f"--device {flag}: there is cuda:0 to cuda:{gpus - 1} here; use cpu, cuda, mps or auto")
    several = rank or int(environment.get("LOCAL_WORLD_SIZE") or 1) > 1
    if several and int(index) != mine:
        raise UserError(
            f"--device {flag} names one GPU for all processes of this machine: give --device cuda, which is each "
            f"process's own (here cuda:{mine}), or start one process"
        )
    return f"cuda:{int(index)}"


def _local_rank(environment: Mapping[str, str]) -> int | None:
    """Which process of this machine this one is, by the names that accelerate reads too."""
    value = next((environment[name] for name in LOCAL_RANKS if environment.get(name)), None)
    if value is not None and not value.isdecimal():
        raise UserError(f"LOCAL_RANK is {value!r}, not the number of a process: unset it, or start with torchrun")
    return None if value is None else int(value)


def resolve_device(flag: str) -> torch.device:
    """The device that ``--device`` names for this process (``device_name``); a GPU becomes the current one.

    Raises:
        UserError: the device is unknown or not here.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = device_name(flag, os.environ, gpus, torch.backends.mps.is_available())
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; use cpu, cuda, mps or auto") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what is allocated without a device's name comes here too
    return device


def free_memory(device: torch.device, system: Path = Path("/")) -> int | None:
    """Bytes that can still be taken on ``device``; ``None`` where that is not known.

    ``system`` is where a CPU's ``proc`` and ``sys`` lie; a container's limit counts too.
    """
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    limits = []
    try:
        for line in (system / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
        group = system / "sys/fs/cgroup"
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)
        used = int((group / "memory.current").read_text()) - (int(cached[1]) if cached else 0)  # the cache gives way
        limits.append(int((group / "memory.max").read_text()) - used)
    except (OSError, ValueError):  # another system, or a group without a limit ("max")
        pass
    return max(0, min(limits)) if limits else None


def give_back_memory() -> None:
    """Free what nothing holds any more, and give a GPU the memory that torch kept of it: others can have it then."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def resolve_dtype(name: str, device: torch.device, training: bool = False) -> torch.dtype:
    """The type of the weights: see ``ModelSettings.dtype``.

    FSDP holds fp32 weights and casts them on its own, so training under it is ``auto`` in fp32.
    """
    import torch

    if name == "auto":
        sharded = training and asks_for_fsdp()
        return torch.bfloat16 if native_bfloat16(device) and not sharded else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
