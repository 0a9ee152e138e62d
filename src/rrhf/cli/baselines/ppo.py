"""Train by PPO or NLPO: responses drawn from the policy, a reward, a value function, a penalty on KL(π, ρ)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rrhf.cli.train import refuse_idle_adapter
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.flag_help import Groups, flags_of, format_help, help_wanted
from rrhf.common.flags import Flags
from rrhf.common.logging import set_up_logging
from rrhf.models.adapters import AdapterSettings
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.rewards.stage import NewTextRewardSettings
from rrhf.training.ppo_settings import NLPOSettings, PPOConfig


@dataclass(frozen=True)
class Files:
    data: str = field(metadata={"help": "records with queries (.jsonl, .jsonl.gz, .parquet)"})
    output: str = field(metadata={"help": "the folder of the trained model"})
    overwrite: bool = field(
        default=False,
        metadata={"help": "replace an output that exists; a stopped training of the same settings goes on"},
    )


def short_help(name: str) -> Groups:
    groups = {
        "files": flags_of(Files),
        "model": flags_of(ModelSettings),
        "rewards": flags_of(NewTextRewardSettings),
        "training": flags_of(PPOConfig),
        "text": flags_of(TextSettings),
        "adapter": flags_of(AdapterSettings),
        "judges, and what they may cost": flags_of(EndpointLimits),
    }
    return {**groups, "mask": flags_of(NLPOSettings)} if name.endswith("nlpo") else groups


def main(arguments: list[str], name: str) -> int:
    if help_wanted(arguments):
        print(format_help(name, str(__doc__), short_help(name)), end="")
        raise SystemExit(0)
    refuse_idle_adapter(arguments)
    masked = name.endswith("nlpo")
    settings = [ModelSettings, Files, NewTextRewardSettings, PPOConfig, TextSettings, AdapterSettings, EndpointLimits]
    model, files, reward, config, text, adapter, remote, *nlpo = Flags(
        settings + ([NLPOSettings] if masked else []), name
    ).parse(arguments)
    set_up_logging()
    from rrhf.recipes.baselines.ppo import Job, train_ppo
    from rrhf.training.callbacks import Stopped

    mask = nlpo[0] if nlpo else None
    job = Job(Path(files.data), Path(files.output), model, reward, config, text, adapter, mask, remote)
    try:
        train_ppo(job, overwrite=files.overwrite)
    except Stopped as stopped:
        print(f"rrhf baseline: {stopped}", file=sys.stderr)
        return stopped.code
    return 0
