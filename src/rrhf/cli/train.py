"""rrhf train: scored responses → policy. Every training argument of transformers is a flag too."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rrhf.cluster.settings import ClusterSettings
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.common.flag_help import (
    Flag,
    Groups,
    chosen,
    flags_of,
    format_help,
    help_wanted,
    settings_in_source,
    without,
)
from rrhf.common.flags import Flags
from rrhf.common.logging import set_up_logging
from rrhf.models.adapters import AdapterSettings
from rrhf.models.load import ModelSettings
from rrhf.rewards.stage import NewTextRewardSettings, ScoringSettings
from rrhf.sampling.settings import SamplingSettings
from rrhf.training.selection import SelectionSettings
from rrhf.training.watch_settings import WatchSettings

if TYPE_CHECKING:
    from rrhf.training.config import RRHFConfig
    from rrhf.training.online import Online

ONLINE = (SamplingSettings, NewTextRewardSettings, ScoringSettings)  # what --resample_steps needs beside training's own
REWARD = "reward"


@dataclass(frozen=True)
class Files:
    data: str = field(
        metadata={"help": "scored records (.jsonl, .jsonl.gz, .parquet); with --resample_steps, queries will do"}
    )
    output: str = field(metadata={"help": "the folder of the trained model"})
    eval_data: str | None = field(
        default=None, metadata={"help": "scored records that are measured every --eval_steps"}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "replace an output that exists; a stopped training of the same settings goes on"},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print what the run will need of the device's memory, and train nothing"}
    )


SHARED = ("rrhf.training.placement", "PlacedArguments")  # what all trainings have
# RRHFConfig's own fields that are about text; its others are shown with the training arguments …
TEXT = ("max_length", "max_query_length", "system_prompt", "chat_template_kwargs")
# … but for those that nobody needs to change …
SETTLED = ("remove_unused_columns", "logging_nan_inf_filter", "hub_token")
# … and so are those of transformers' training arguments that people use, in our words.
COMMON = [
    Flag("max_steps", "int", -1, "optimiser steps in all, in place of --num_train_epochs"),
    Flag("lr_scheduler_type", "str", "linear", "how the learning rate falls: linear, cosine, constant_with_warmup, …"),
    Flag("weight_decay", "float", 0.0, "pull of the weights towards 0"),
    Flag("max_grad_norm", "float", 1.0, "longer gradients are cut to this norm"),
    Flag("gradient_checkpointing", "bool", None, "less memory for more time: activations are computed twice"),
    Flag("optim", "str", "adamw_torch_fused", "the optimiser: adamw_torch_fused, adafactor, adamw_bnb_8bit, …"),
    Flag("save_steps", "float", 500, "optimiser steps between two checkpoints, or below 1 their share of all steps"),
    Flag("save_total_limit", "int", None, "older checkpoints than so many are deleted"),
    Flag("eval_steps", "float", None, "optimiser steps between two measurements of --eval_data"),
    Flag("report_to", "str", "none", "trackers that get the metrics: tensorboard, wandb, … (install them)"),
    Flag("run_name", "str", None, "the run's name in the trackers"),
    Flag("seed", "int", 42, "seed of every random choice"),
    Flag("push_to_hub", "bool", False, "upload the trained model to the Hugging Face hub"),
    Flag("hub_model_id", "str", None, "USER/NAME there"),
]


def own_flags(module: str, name: str) -> list[Flag]:
    """What a training's settings class declares itself, and what all trainings share."""
    return [flag for place in ((module, name), SHARED) for flag in flags_of(settings_in_source(*place))]


def short_help() -> Groups:
    """The flags that are RRHF's own, and those of transformers' that people use."""
    own = own_flags("rrhf.training.config", "RRHFConfig")
    return {
        "files": flags_of(Files),
        "model": flags_of(ModelSettings),
        "text": chosen(own, TEXT),
        "loss": [*flags_of(settings_in_source("rrhf.losses", "LossSettings")), *flags_of(SelectionSettings)],
        "adapter": flags_of(AdapterSettings),
        "training": [*without(own, (*TEXT, *SETTLED)), *COMMON],
        "with --resample_steps, how responses are sampled and scored": online_help(),
        "watching the training": flags_of(WatchSettings),
        "judges, and what they may cost": flags_of(EndpointLimits),
        "on a cluster": flags_of(ClusterSettings),
    }


def online_help() -> list[Flag]:
    """What --resample_steps needs: how responses are sampled and scored. --reward is required with it alone."""
    own = own_flags("rrhf.training.config", "RRHFConfig")
    elsewhere = [flag.name for flag in [*own, *COMMON, *flags_of(ModelSettings)]]
    flags = without([flag for settings in ONLINE for flag in flags_of(settings)], elsewhere)
    return [replace(flag, required=False) if flag.name == REWARD else flag for flag in flags]


def whole_help() -> Groups:
    """``short_help`` and every other training argument of transformers."""
    from rrhf.training.config import RRHFConfig

    groups = short_help()
    shown = [flag.name for flags in groups.values() for flag in flags]
    return {**groups, "other training arguments of transformers": without(flags_of(RRHFConfig), shown)}


def flags(online: bool = True) -> Flags:
    """The flags of a training; ``online``: of one that samples and scores as well."""
    from rrhf.training.config import RRHFConfig

    # A flag of several has the help and the default of the last.
    kinds = [Files, AdapterSettings, *(ONLINE if online else ()), ModelSettings, RRHFConfig, WatchSettings,
             EndpointLimits, ClusterSettings]  # fmt: skip
    return Flags(kinds, "train")


def main(arguments: list[str]) -> int:
    if wanted := help_wanted(arguments):
        groups = whole_help() if wanted == "--help-all" else short_help()
        print(format_help("train", str(__doc__), groups, "and every other training argument of transformers"), end="")
        raise SystemExit(0)
    sampled = [flag.name for flag in online_help()]
    refuse_idle(arguments, sampled, "responses that are sampled while training", "resample_steps")
    refuse_idle_adapter(arguments)
    refuse_idle_evaluation(arguments)
    refuse_idle_limits(arguments, "resample_steps", "watch_steps")
    if not given(arguments, ["resample_steps"]):
        files, adapter, model, config, watch, remote, cluster = flags(online=False).parse(with_output(arguments))
        set_up_logging()
        return carry_out(Path(files.data), model, files, adapter, config, watch, cluster=cluster, remote=remote)
    from rrhf.training.online import Online
    from rrhf.training.windows import FOLDER

    parsed = flags().parse(with_output(arguments))
    files, adapter, sampling, rewards, scoring, model, config, watch, remote, cluster = parsed
    set_up_logging()
    context = scoring.context(config.text, remote, journals=Path(files.output) / FOLDER)
    online = Online(sampling, rewards.reward, rewards.reward_weights or None, scoring.reward_normalisation, context,
                    scoring.kl_beta)  # fmt: skip
    asked = online if config.resample_steps else None
    return carry_out(Path(files.data), model, files, adapter, config, watch, asked, cluster, remote)


def refuse_idle(arguments: Sequence[str], names: Sequence[str], what: str, *needed: str) -> None:
    """Refuse flags of ``names`` where none of ``needed`` is given, without which they do nothing."""
    if not given(arguments, needed) and (idle := given(arguments, names)):
        raise UserError(f"--{idle[0]} is for {what}: give --{' or --'.join(needed)} too")


def refuse_idle_adapter(arguments: Sequence[str]) -> None:
    """Refuse the size of an adapter that is not trained."""
    refuse_idle(arguments, [flag.name for flag in flags_of(AdapterSettings)], "an adapter", "peft")


def refuse_idle_evaluation(arguments: Sequence[str]) -> None:
    """Refuse to say how often what is not there is measured."""
    refuse_idle(arguments, ["eval_steps"], "held-out records", "eval_data")


def refuse_idle_limits(arguments: Sequence[str], *askers: str) -> None:
    """Refuse to say how judges are asked where none of ``askers`` is given, which ask them."""
    refuse_idle(arguments, [flag.name for flag in flags_of(EndpointLimits)], "judges that are asked while training",
                *askers)  # fmt: skip


def given(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Those flags of ``names`` that stand among the arguments."""
    there = {a.partition("=")[0][2:].replace("-", "_") for a in arguments if a.startswith("--")}
    return [name for name in names if name in there]


def carry_out(
    data: Path,
    model: ModelSettings,
    files: Files,
    adapter: AdapterSettings,
    config: RRHFConfig,
    watch: WatchSettings,
    online: Online | None = None,
    cluster: ClusterSettings | None = None,
    remote: EndpointLimits | None = None,
) -> int:
    """Train on ``data``, which need not be ``files.data``; the exit code."""
    from rrhf.cluster.training import training_on
    from rrhf.report.hub import card_of_training
    from rrhf.training.callbacks import Stopped
    from rrhf.training.stage import plan_training

    eval_data = Path(files.eval_data) if files.eval_data else None
    if files.dry_run:
        plan = plan_training(data, model, config, adapter, eval_data=eval_data, online=online)
        print(plan.table())
        if not plan.fits:
            print(plan.advice())
        return 0
    try:
        training_on(cluster)(
            data,
            model,
            config,
            adapter,
            eval_data=eval_data,
            overwrite=files.overwrite,
            watch=watch,
            watch_remote=remote,
            online=online,
            saved=card_of_training,
        )
    except Stopped as stopped:
        print(f"rrhf train: {stopped}", file=sys.stderr)
        return stopped.code
    return 0


def with_output(arguments: list[str]) -> list[str]:
    """``--output`` is transformers' ``--output_dir``; its reduced-precision flags need the device to be known first."""
    for i, argument in reversed([*enumerate(arguments)]):  # the last one counts, as of every flag
        if argument == "--output" and i + 1 < len(arguments):
            return [*arguments, f"--output_dir={arguments[i + 1]}"]
        if argument.startswith("--output="):
            return [*arguments, f"--output_dir={argument.partition('=')[2]}"]
    return arguments
