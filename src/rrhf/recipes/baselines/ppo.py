"""PPO and NLPO as commands: a file of queries, a model and a reward → a model folder, resumable."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.environment import environment
from rrhf.common.errors import UserError
from rrhf.common.files import read_object, write_text
from rrhf.common.launch import launched_processes
from rrhf.common.progress import Progress
from rrhf.common.remote import origin
from rrhf.common.settings import refuse_other_settings
from rrhf.models.adapters import (
    AdapterSettings,
    load_policy_or_adapter,
    merged,
    peft_config,
    refuse_lost_base,
    with_adapter,
)
from rrhf.models.devices import resolve_device
from rrhf.models.folders import save_policy
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import read_records, require_file
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.scoring import Rewards, is_provided, reward_digest
from rrhf.rewards.stage import RewardSettings
from rrhf.training.callbacks import StopOnSignal, Stopped
from rrhf.training.folder import SETTINGS, begun, claimed, complete, naming_full_disk
from rrhf.training.ppo import PPO, Models
from rrhf.training.ppo_checkpoint import load_checkpoint, save_checkpoint, state
from rrhf.training.ppo_settings import NLPOSettings, PPOConfig
from rrhf.training.reference import refuse_other_tokenizer

log = logging.getLogger("rrhf")

FREE = {"save_steps", "save_total_limit"}  # what a resumed run may change without becoming another run
NAMED = {"model", "reference_model", "value_model", "data"}  # where the contents are known, where they lie is free


@dataclass(frozen=True)
class Job:
    """What is asked for; ``nlpo`` makes NLPO of it. ``remote``: how judges are asked, and what they may cost."""

    data: Path
    folder: Path
    model: ModelSettings
    reward: RewardSettings
    config: PPOConfig
    text: TextSettings
    adapter: AdapterSettings
    nlpo: NLPOSettings | None = None
    remote: EndpointLimits = field(default_factory=EndpointLimits)

    @property
    def name(self) -> str:
        return "ppo" if self.nlpo is None else "nlpo"

    @property
    def context(self) -> RewardContext:
        return RewardContext(
            device=self.model.device,
            dtype=self.model.dtype,
            max_tokens_per_forward=self.config.max_tokens_per_forward,
            text=self.text,
            reference_model=self.config.reference_model,
            remote=self.remote,
            seed=self.config.seed,
        )


def train_ppo(job: Job, *, overwrite: bool = False) -> dict[str, Any]:
    """Train ``job.model`` on the queries of ``job.data`` and write it to ``job.folder``, as `rrhf train` does.

    A folder that holds checkpoints of the same settings is continued: killed anywhere and run again, the weights at the
    end are those of an undisturbed run.

    Returns:
        The summary that stands in ``training.json``.

    Raises:
        UserError: several processes, the folder is complete already or holds a run with other settings, a reward
            cannot score new texts, or the reference or the value model has another tokenizer.
        Stopped: a signal came; everything up to the last rollout is kept.
    """
    _refuse(job)
    job = replace(job, model=replace(job.model, device=str(resolve_device(job.model.device))))
    with claimed(job.folder, OneProcess()):
        settings = begun(job.folder, OneProcess(), overwrite, lambda: _remember(job))
        rewards = Rewards(job.reward.reward, weights=job.reward.reward_weights or None, context=job.context)
        try:
            ppo = _build(job, rewards)
            history = _run(job, ppo)
        finally:
            rewards.close()
        return _save(job, ppo, settings, history)


@dataclass(frozen=True)
class OneProcess:
    """This process, where there is no other."""

    process_index: int = 0


def _refuse(job: Job) -> None:
    require_file(job.data)
    if launched_processes() > 1:
        raise UserError(f"rrhf baseline {job.name} runs in one process: start it without torchrun or accelerate")
    for reward in job.reward.reward:
        if is_provided(reward):
            raise UserError(f"--reward {reward}: cannot score new texts; give pkg.module:function, or a reward model")
    if job.adapter.peft == "qlora":
        raise UserError(f"--peft qlora: `rrhf baseline {job.name}` trains whole weights or --peft lora")
    if job.adapter.lora_dropout:
        raise UserError(f"--lora_dropout {job.adapter.lora_dropout}: dropout is off here: leave it out")
    refuse_lost_base(job.adapter, job.model.model)


def _remember(job: Job) -> dict[str, Any]:
    """Write down what this run is; refuse to go on with a run that was another."""
    config = asdict(job.config)
    models = {"model": job.model.model, **{name: config.pop(name) for name in ("reference_model", "value_model")}}
    nlpo = asdict(job.nlpo) if job.nlpo else {}
    settings: dict[str, Any] = {
        "baseline": job.name, "data": origin(job.data), "data_checksum": checksum_of_file(job.data), **models,
        **{f"{name}_digest": model_digest(model) for name, model in models.items() if model},
        "dtype": job.model.dtype, "device": job.model.device, **config, **nlpo,
        **asdict(job.text), **asdict(job.reward), **asdict(job.adapter),
        **{f"code of {reward}": reward_digest(reward, job.context) for reward in job.reward.reward},
    }  # fmt: skip
    place = job.folder / SETTINGS
    if place.exists():
        before = read_object(place)
        same = {name for name in NAMED if before.get(name) and settings.get(name)}
        free = FREE | {name for name in same if f"{name}_digest" in settings or f"{name}_checksum" in settings}
        refuse_other_settings(
            {name: value for name, value in before.items() if name not in free},
            {name: value for name, value in json.loads(json.dumps(settings)).items() if name not in free},
            f"{job.folder} holds a training run with other settings",
            "run with those to go on, or give --overwrite to train anew",
            of={f"{name}_{content}": settings.get(name) for name in NAMED for content in ("digest", "checksum")},
        )
    write_text(place, json.dumps(settings, indent=1) + "\n")
    return settings


def _build(job: Job, rewards: Rewards) -> PPO:
    """The models that are needed, loaded, and what trains them."""
    queries = list(read_records(job.data, require="query"))
    if not queries:
        raise UserError(f"{job.data}: there is no query to train on")
    policy, tokenizer = load_policy_or_adapter(job.model, training=True)
    reference = job.config.reference_model
    value = job.config.value_model
    adapted = job.adapter.peft is not None
    if adapted:
        policy = with_adapter(policy, peft_config(job.adapter))

    def other(name: str, flag: str, otherwise: str, training: bool = False) -> Any:
        model, theirs = load_policy_or_adapter(replace(job.model, model=name), training)
        refuse_other_tokenizer(theirs, tokenizer, name, flag, f", or leave it out: {otherwise}")
        return model

    rho = critic = None
    if not adapted or reference is not None:
        rho = other(reference or job.model.model, "--reference_model", "it is then the model before training")
        rho.requires_grad_(False).eval()
    if value is not None:
        critic = other(value, "--value_model", "values are then read off the policy", training=True)
    models = Models(policy, tokenizer, rho, critic)
    ppo = PPO(models, rewards, queries, job.config, job.text, job.nlpo)
    log.info(
        f"{job.name}: {len(queries)} queries, {ppo.total} rollouts of {job.config.rollout_queries} queries with "
        f"{job.config.num_responses} responses, {job.config.steps_per_rollout} optimiser steps each; {policy.dtype} "
        f"weights, {ppo.path} pass; {ppo.models_resident} models in memory"
    )
    return ppo


def _run(job: Job, ppo: PPO) -> list[dict[str, Any]]:
    """The rollouts that are left; returns the metrics of all."""
    history = load_checkpoint(ppo, job.folder) or []
    if history:
        log.info(f"{job.name}: going on from rollout {ppo.done}")
    stop, saved = StopOnSignal(), ppo.steps
    with stop.listening(), naming_full_disk(job.folder), Progress(job.name, ppo.total, "rollouts", ppo.done) as bar:
        while ppo.done < ppo.total:
            began = time.perf_counter()
            metrics = ppo.step()
            took = time.perf_counter() - began
            history.append({"step": ppo.steps, "rollout": ppo.done, **metrics, "seconds": round(took, 3)})
            bar.update(1)
            shown = ("reward_mean", "kl", "entropy", "clip_fraction", "value_loss", "explained_variance")
            with bar.set_aside():
                values = "  ".join(f"{name} {metrics[name]:.4g}" for name in shown)
                log.info(f"rollout {ppo.done}/{ppo.total}  {values}")
            if ppo.steps - saved >= job.config.save_steps or stop.signal is not None:
                save_checkpoint(ppo, job.folder, history)
                saved = ppo.steps
            if stop.signal is not None and ppo.done < ppo.total:
                raise Stopped(128 + stop.signal)
    return history


def _save(job: Job, ppo: PPO, settings: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the weights, then the summary, which makes the folder complete."""
    policy: Any = ppo.models.policy
    if job.adapter.peft is not None and job.adapter.merge_adapter:
        policy = merged(policy, job.model)
    with naming_full_disk(job.folder):
        save_policy(policy, ppo.models.tokenizer, job.folder)
    summary = {
        "settings": settings,
        "records": len(ppo.queries),
        "path": ppo.path,
        "steps": ppo.steps,
        "rollouts": ppo.done,
        "responses": sum(line["responses"] for line in history),
        "seconds": round(sum(line["seconds"] for line in history), 1),
        "models_resident": ppo.models_resident,
        "peak_memory_bytes": peak_memory(job.model.device),
        "environment": environment(),
    }
    write_text(job.folder / "trainer_state.json", json.dumps(state(ppo, history), indent=1) + "\n")
    complete(job.folder, summary)
    for old in job.folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    return summary


def peak_memory(device: str) -> int:
    """The most bytes held so far: allocated on a GPU, resident of this process on a CPU."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(kilobytes * (1 if sys.platform == "darwin" else 1024))
