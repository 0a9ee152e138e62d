"""Launches: processes that are connected train together, all others are refused. Real launchers, real processes."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

import pytest

from rrhf.common.errors import UserError
from rrhf.common.launch import check_connected, is_first, launched_processes, wait_for_first, warn_of_whole_weights
from rrhf.common.locks import LOCK, hold
from rrhf.training.folder import SETTINGS
from support import tiny
from support.ports import free_port
from support.tiny import count

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch")
LEAVE = "torch.distributed:destroy_process_group"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data, and an environment that no launcher has touched."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "RANK", "WORLD_", "LOCAL_", "MASTER_", "PMI_", "OMPI_")):
            monkeypatch.delenv(name)
    tiny.write_model(tmp_path / "base")
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(6, responses=3))
    return tmp_path


TRAIN = (
    "train", "--model", "./base", "--data", "scored.jsonl", "--output", "out", "--device", "cpu", "--dtype", "float32",
    "--bf16", "false", "--report_to", "none", "--max_steps", "2", "--gradient_accumulation_steps", "1",
    "--save_strategy", "no", "--ddp_timeout", "120",
)  # fmt: skip


def fsdp2() -> str:
    return str(resources.files("rrhf") / "recipes" / "configs" / "accelerate" / "fsdp2.yaml")


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate with FSDP"])
def test_two_processes_train_together_and_leave_in_order(launcher: str, place: Path) -> None:
    fsdp = launcher != "torchrun"
    command = (*ACCELERATE, "--config_file", fsdp2(), "--num_processes", "2") if fsdp else TORCHRUN
    calls = place / "calls"
    done = tiny.cold(*TRAIN, "--overwrite", cwd=place, launcher=command, faults=[count(LEAVE, calls)]).done()
    assert "2 process(es)" in done.err
    assert ("accelerate made" in done.err and "holds all weights" in done.err) == fsdp
    assert len(calls.read_text().split()) == 2  # each took its process group down
    assert "terminate called" not in done.err
    assert json.loads((place / "out" / "training.json").read_text())["steps"] == 2


def test_accelerate_starts_one_process_for_two_on_a_cpu(place: Path) -> None:
    refused = tiny.cold(*TRAIN, cwd=place, launcher=(*ACCELERATE, "--cpu", "--num_processes", "2"))
    assert refused.code != 0
    assert "asked for several processes but started this one alone" in refused.err and "torchrun" in refused.err
    assert not (place / "out").exists()


def test_mpi_processes_train_together(place: Path) -> None:
    """As ``mpirun -n 2 rrhf train`` starts them, with the variables that its process manager sets."""
    port = str(free_port())
    forks = tiny.forks(*tiny.PRELOADED)
    shared = {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        forks.start(
            "rrhf.cli.main:main", list(TRAIN), cwd=place, env={**shared, "PMI_RANK": rank, "MPI_LOCALRANKID": rank}
        )
        for rank in ("0", "1")
    ]
    first, _ = [forks.wait(process).done() for process in started]
    assert "2 process(es)" in first.err


def test_a_signal_that_one_process_gets_stops_both_at_one_step(place: Path) -> None:
    """A launcher signals one after another: between them a step may end."""
    port = str(free_port())
    forks = tiny.forks(*tiny.PRELOADED)
    shared = {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    step = "rrhf.training.trainer:RRHFTrainer.training_step"
    faults = {"0": [], "1": [tiny.die(step, 2, "TERM")]}
    longer = [*TRAIN, "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "100"]
    started = [
        forks.start(
            "rrhf.cli.main:main", longer, cwd=place, faults=faults[rank],
            env={**shared, "PMI_RANK": rank, "RANK": rank, "WORLD_SIZE": "2", "MPI_LOCALRANKID": rank},
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    assert [forks.wait(process).code for process in started] == [143, 143]
    (checkpoint,) = (place / "out").glob("checkpoint-*")
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= {path.name for path in checkpoint.iterdir()}


def test_a_second_training_into_the_same_folder(place: Path) -> None:
    """Whatever started two processes that do not know of each other, the second finds the folder taken."""
    (place / "out").mkdir()
    for name in ("kept", SETTINGS):
        (place / "out" / name).write_text("of the other one")
    other = hold(place / "out" / LOCK, "taken")
    refused = tiny.warm(*TRAIN, "--overwrite", cwd=place)
    assert refused.code == 2
    assert f"out: another process trains into this folder: process {os.getpid()} on " in refused.err
    assert {path.name for path in (place / "out").iterdir()} == {"kept", SETTINGS, LOCK}
    other.close()
    tiny.warm(*TRAIN, "--overwrite", cwd=place).done()
    assert not (place / "out" / "kept").exists()


@pytest.mark.parametrize(("rank", "world", "first"), [("0", "2", True), ("1", "2", False), ("1", None, True)])
def test_which_process_is_the_first(
    rank: str, world: str | None, first: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank without a number of processes is no launch's: nobody else would do what is done once."""
    monkeypatch.setenv("RANK", rank)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert is_first() == first
    wait_for_first(lambda: True)


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        ({"MASTER_ADDR": "node7"}, 1),  # of a cluster's login
        ({"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "node7"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}, 3),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1),
        ({"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h"}, 2),
        ({"ACCELERATE_MIXED_PRECISION": "no", "PMI_SIZE": "2", "PMI_RANK": "0", "MASTER_ADDR": "h"}, 2),
    ],
)
def test_how_many_processes_there_are(environment: dict[str, str], processes: int) -> None:
    assert launched_processes(environment) == processes


def test_launches_that_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="WORLD_SIZE says 2 processes, but RANK and MASTER_ADDR are not set"):
        launched_processes({"WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"):
        launched_processes({"WORLD_SIZE": "two"})
    with pytest.raises(UserError, match="started this one alone"):
        launched_processes({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"})
    with pytest.raises(UserError, match="4 processes were started but the trainer sees 1"):
        check_connected(4, 1)
    check_connected(2, 2)
    warn_of_whole_weights("DistributedType.FSDP", {"ACCELERATE_USE_FSDP": "true"})
    warn_of_whole_weights("DistributedType.MULTI_CPU", {})
    assert not caplog.records
