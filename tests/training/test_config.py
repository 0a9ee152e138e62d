"""``--device`` against the device that transformers' training arguments chose before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.training_args import ParallelMode

from rrhf.common.errors import UserError
from rrhf.training import placement
from rrhf.training.config import RRHFConfig


@pytest.fixture
def on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RRHFConfig:
    """The arguments of a run that transformers put on the first of two GPUs, which are not here."""
    monkeypatch.setattr(placement, "native_bfloat16", lambda device: device.type == "cuda")
    monkeypatch.setattr(placement, "resolve_device", torch.device)
    config = RRHFConfig(output_dir=str(tmp_path), report_to="none")
    config.use_cpu, config.bf16, config.mixed_precision = False, True, "bf16"
    config.__dict__["_setup_devices"], config._n_gpu = torch.device("cuda:0"), 2
    return config


def test_training_goes_to_the_gpu_that_is_named(on_a_gpu: RRHFConfig) -> None:
    assert on_a_gpu.place("auto") == torch.device("cuda:0")
    assert on_a_gpu.place("cuda:0") == torch.device("cuda:0")
    assert on_a_gpu.place("cuda:1") == on_a_gpu.device == torch.device("cuda:1")
    assert on_a_gpu.n_gpu == 1  # nothing is split over the others
    assert not on_a_gpu.use_cpu


def test_training_goes_to_the_cpu(on_a_gpu: RRHFConfig) -> None:
    assert on_a_gpu.place("cpu") == on_a_gpu.device == torch.device("cpu")
    assert (on_a_gpu.use_cpu, on_a_gpu.dataloader_pin_memory, on_a_gpu.n_gpu) == (True, False, 0)
    assert (on_a_gpu.bf16, on_a_gpu.mixed_precision) == (False, "no")  # what this CPU does by default


def test_devices_that_contradict_each_other(on_a_gpu: RRHFConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu.place("cpu")
    with pytest.raises(UserError, match=r"--device cuda:1: the training is set up on cpu \(--use_cpu\)"):
        on_a_gpu.place("cuda:1")


def test_connected_processes_stay_where_they_are(on_a_gpu: RRHFConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RRHFConfig, "parallel_mode", ParallelMode.DISTRIBUTED)
    assert on_a_gpu.place("cuda:1") == torch.device("cuda:0")  # resolve_device refuses a GPU that is not its own
    with pytest.raises(UserError, match=r"--device cpu: .*connected for cuda.*--use_cpu true as well"):
        on_a_gpu.place("cpu")
