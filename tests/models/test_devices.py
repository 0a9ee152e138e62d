"""Which device a process takes, by the flag, the launcher's environment and the GPUs it sees."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rrhf.common.errors import UserError
from rrhf.models import devices
from rrhf.models.devices import device_name, free_memory, resolve_device, set_up_memory


def launched(rank: int, processes: int) -> dict[str, str]:
    """What torchrun sets."""
    world = str(processes)
    return {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}


@pytest.mark.parametrize("flag", ["auto", "cuda"])
def test_every_process_has_a_gpu_of_its_own(flag: str) -> None:
    assert [device_name(flag, launched(rank, 4), 8, False) for rank in range(4)] == [
        "cuda:0", "cuda:1", "cuda:2", "cuda:3"
    ]  # fmt: skip
    assert device_name(flag, {}, 8, False) == "cuda:0"
    assert device_name(flag, {"OMPI_COMM_WORLD_LOCAL_RANK": "3"}, 8, False) == "cuda:3"


def test_a_launcher_may_show_each_process_its_own_gpu_alone() -> None:
    assert {device_name("auto", launched(rank, 4), 1, False) for rank in range(4)} == {"cuda:0"}


def test_a_gpu_that_is_named() -> None:
    assert device_name("cuda:1", {}, 2, False) == "cuda:1"
    assert device_name("cuda:1", launched(0, 1), 2, False) == "cuda:1"
    assert device_name("cuda:1", launched(1, 2), 2, False) == "cuda:1"  # its own
    for rank, named in ((0, "cuda:1"), (1, "cuda:0")):
        with pytest.raises(UserError, match=rf"--device {named} names one GPU.*--device cuda.*here cuda:{rank}"):
            device_name(named, launched(rank, 2), 2, False)


def test_too_few_gpus() -> None:
    with pytest.raises(UserError, match=r"process 2 .* no GPU of its own, 2 are here.*--device cpu"):
        device_name("auto", launched(2, 3), 2, False)
    for flag in ("cuda:2", "cuda:x", "cuda:-1", "cuda:"):
        with pytest.raises(UserError, match=r"cuda:0 to cuda:1 here; use cpu, cuda, mps or auto"):
            device_name(flag, {}, 2, False)
    for flag in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match=r"sees no CUDA GPU here; use cpu, cuda, mps or auto"):
            device_name(flag, {}, 0, True)


def test_without_cuda() -> None:
    assert device_name("auto", launched(1, 2), 0, False) == "cpu"
    assert device_name("auto", {}, 0, True) == "mps"
    assert device_name("auto", {}, 2, True) == "cuda:0"
    assert device_name("cpu", launched(1, 2), 2, False) == "cpu"
    assert device_name("mps", {}, 0, True) == "mps"


def test_a_local_rank_that_is_no_number() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK is 'one'"):
        device_name("auto", {"LOCAL_RANK": "one"}, 2, False)


def test_a_process_of_a_launch_makes_its_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag's way to torch, with two GPUs that are not here."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *sizes, device: None)
    for name, value in launched(1, 2).items():
        monkeypatch.setenv(name, value)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")] * 2
    assert resolve_device("cpu") == torch.device("cpu")
    assert len(current) == 2


# --- memory -------------------------------------------------------------------------------------------------------

GROWING = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere neither allocator can be told")
@pytest.mark.parametrize(
    ("gpu", "arguments", "environment", "kept", "after"),
    [
        (None, [], {}, 1, {}),
        ("nvidia3", [], {}, 0, GROWING),
        ("kfd", ["--device", "cuda:1"], {}, 0, GROWING),
        ("nvidiactl", [], {}, 1, {}),  # the driver, without a GPU
        ("nvidia0", ["--device", "cpu"], {}, 1, {}),
        ("nvidia0", ["--device=cpu"], {}, 1, {}),
        ("nvidia0", [], {"CUDA_VISIBLE_DEVICES": ""}, 1, {"CUDA_VISIBLE_DEVICES": ""}),
        ("nvidia0", [], {"PYTORCH_ALLOC_CONF": "x"}, 0, {"PYTORCH_ALLOC_CONF": "x"}),
        ("nvidia0", [], {"PYTORCH_CUDA_ALLOC_CONF": "x"}, 0, {"PYTORCH_CUDA_ALLOC_CONF": "x"}),
    ],
)
def test_a_cpu_keeps_freed_memory_and_a_gpu_has_segments_that_grow(
    gpu: str | None,
    arguments: list[str],
    environment: dict[str, str],
    kept: int,
    after: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: calls.append(None))
    if gpu is not None:
        (tmp_path / gpu).touch()
    set_up_memory(arguments, environment, tmp_path)
    assert (len(calls), environment) == (kept, after)


def test_free_memory_is_what_the_system_and_the_container_leave(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert free_memory(cpu, tmp_path) is None
    group = tmp_path / "sys/fs/cgroup"
    (tmp_path / "proc").mkdir()
    group.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemFree: 5 kB\nMemAvailable:    4000 kB\n")
    assert free_memory(cpu, tmp_path) == 4000 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 400000\nactive_file 7\n")
    assert free_memory(cpu, tmp_path) == 4000 * 1024
    (group / "memory.max").write_text("3000000\n")
    assert free_memory(cpu, tmp_path) == 2400000  # files that were read and can be read again are not in the way
    (group / "memory.stat").write_text("inactive_file 0\n")
    assert free_memory(cpu, tmp_path) == 2000000
    (group / "memory.current").write_text("3500000\n")
    assert free_memory(cpu, tmp_path) == 0
    assert free_memory(torch.device("meta")) is None
