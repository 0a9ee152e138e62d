"""Checkpoints of ``rrhf.training.ppo``: all that the next rollout depends on, so that a resumed run ends bit for bit as
an undisturbed one. There is no random state in them: every rollout's random numbers are made from the seed and its
number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rrhf.common.files import fsync_folder, write_text
from rrhf.models.folders import open_to_readers
from rrhf.training.folder import last_checkpoint, seal
from rrhf.training.ppo import PPO

WEIGHTS, OPTIMISER, STATE = "trained.safetensors", "optimizer.pt", "trainer_state.json"


def save_checkpoint(ppo: PPO, folder: Path, history: list[dict[str, Any]]) -> None:
    """Write ``folder/checkpoint-STEPS``; its ``trainer_state.json``, which comes last, makes it whole."""
    checkpoint = folder / f"checkpoint-{ppo.steps}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().contiguous() for name, p in _trained(ppo).items()}, checkpoint / WEIGHTS)
    open_to_readers(checkpoint)
    torch.save({"optimiser": ppo.optimiser.state_dict(), "schedule": ppo.schedule.state_dict()}, checkpoint / OPTIMISER)
    write_text(checkpoint / STATE, json.dumps(state(ppo, history), indent=1) + "\n")
    seal(checkpoint)
    fsync_folder(folder)
    for old in _checkpoints(folder)[: -ppo.config.save_total_limit]:
        shutil.rmtree(old)


def load_checkpoint(ppo: PPO, folder: Path) -> list[dict[str, Any]] | None:
    """Put ``ppo`` where the last whole checkpoint of ``folder`` was; its history, or None where there is none."""
    name = last_checkpoint(folder, check=True)
    if name is None:
        return None
    checkpoint = Path(name)
    kept = load_file(checkpoint / WEIGHTS)
    with torch.no_grad():
        for name, parameter in _trained(ppo).items():
            parameter.copy_(kept[name])
    # Types, sizes and numbers alone: no object is made of the file.
    states = torch.load(checkpoint / OPTIMISER, map_location="cpu", weights_only=True)
    ppo.optimiser.load_state_dict(states["optimiser"])
    ppo.schedule.load_state_dict(states["schedule"])
    found = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    ppo.done, ppo.steps, ppo.beta = found["rollouts"], found["global_step"], found["kl_beta"]
    history: list[dict[str, Any]] = found["log_history"]
    return history


def state(ppo: PPO, history: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``trainer_state.json`` says; reports read its ``log_history`` as they read that of `rrhf train`."""
    most = ppo.total * ppo.config.steps_per_rollout
    position = {"global_step": ppo.steps, "max_steps": most, "rollouts": ppo.done, "kl_beta": ppo.beta}
    return {**position, "log_history": history}


def _trained(ppo: PPO) -> dict[str, Tensor]:
    """The parameters that change, by the names of their modules; those of NLPO's lagged copy too."""
    modules: dict[str, nn.Module] = dict(ppo.trained)
    named = {f"{part}.{name}": p for part, m in modules.items() for name, p in m.named_parameters() if p.requires_grad}
    if ppo.lagged is not None:
        changing = {name for name, p in ppo.models.policy.named_parameters() if p.requires_grad}
        named |= {f"lagged.{name}": p for name, p in ppo.lagged.named_parameters() if name in changing}
    return dict(named)


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))
