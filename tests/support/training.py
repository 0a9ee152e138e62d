"""Trainings of a step or a few, bare of schedules and files, and what their steps came to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from rrhf.training.config import RRHFConfig


class Gradients(TrainerCallback):
    """Keeps the gradients of the last optimiser step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def config(folder: Path, **options: Any) -> RRHFConfig:
    """SGD on the CPU at a constant rate, nothing saved or shown."""
    plain = {
        "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "warmup_steps": 0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "sgd",
    }  # fmt: skip
    return RRHFConfig(output_dir=str(folder), **{**plain, **options})
