"""Whether the processes of a launch are connected: else each would train a model of its own without a word."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping

from rrhf.common.errors import UserError

log = logging.getLogger("rrhf")

# How launchers say how many processes there are, and which one this is; accelerate reads the same names.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def rank_and_world(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which process this is and how many there are, as torchrun says it (RANK, WORLD_SIZE); (0, 1) without one."""
    return int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process does what is done once in a launch."""
    rank, world = rank_and_world()
    return rank == 0 or world == 1


def wait_for_first(done: Callable[[], bool]) -> None:
    """Wait until the first process of a launch has made what ``done`` looks for; the launcher ends all if it fails."""
    while not is_first() and not done():
        time.sleep(0.2)


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher says there are; 1 without a launcher.

    Raises:
        UserError: they cannot find each other, or the launcher was asked for several and started one.
    """
    name = next((name for name in SIZES if environment.get(name)), None)
    try:
        world = int(environment[name]) if name else 1
    except ValueError as error:
        raise UserError(f"{name} is {environment[str(name)]!r}, not a number of processes: unset it") from error
    if name == "WORLD_SIZE" and world > 1:
        missing = [needed for needed in ("RANK", "MASTER_ADDR") if needed not in environment]
        if missing:
            raise UserError(
                f"WORLD_SIZE says {world} processes, but {' and '.join(missing)} are not set: they would train apart. "
                "Start them with torchrun, or unset WORLD_SIZE"
            )
    # `accelerate launch --cpu --num_processes N` sets an address for N processes, then starts one by itself.
    accelerated = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if accelerated and not any(rank in environment for rank in (*RANKS, "LOCAL_RANK")):
        raise UserError(
            "accelerate launch was asked for several processes but started this one alone, as it does on a CPU: use "
            "torchrun --nproc_per_node N (docs/distributed.md), or --num_processes 1 with MASTER_ADDR unset"
        )
    return world


def check_connected(started: int, seen: int) -> None:
    """Refuse a launch of ``started`` processes in which the trainer sees another number.

    Raises:
        UserError: the numbers differ.
    """
    if started != seen:
        raise UserError(
            f"{started} processes were started but the trainer sees {seen}: they would train apart. On a CPU start "
            "them with torchrun and leave ACCELERATE_* variables unset; on GPUs check the launcher"
        )


def asks_for_fsdp(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether accelerate is told to shard the weights; it reads the variable in either case."""
    return environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def warn_of_whole_weights(distributed_type: str, environment: Mapping[str, str] = os.environ) -> None:
    """Say so where sharded weights were asked for and accelerate made something else of it, as it does on a CPU."""
    if asks_for_fsdp(environment) and not distributed_type.endswith("FSDP"):
        log.warning(
            f"FSDP was asked for, but accelerate made {distributed_type} of it, as it does on a CPU: every process "
            "holds all weights"
        )


def end_process_group() -> None:
    """Take down the process group, if there is one, while the interpreter is whole.

    Left to the interpreter's end, a thread of the group can let go of a tensor, or be destroyed, when Python is half
    gone: the process then aborts ("terminate called without an active exception") though its work is done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # trainers and models that hold the group
        distributed.destroy_process_group()
