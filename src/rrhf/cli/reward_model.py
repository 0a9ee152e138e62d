"""rrhf reward-model: pairs or ranked lists → a reward model that `--reward` takes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rrhf.cli.train import COMMON, SETTLED, own_flags, refuse_idle_evaluation, with_output
from rrhf.common.flag_help import Groups, flags_of, format_help, help_wanted, without
from rrhf.common.flags import Flags
from rrhf.common.logging import set_up_logging
from rrhf.models.load import ModelSettings


@dataclass(frozen=True)
class Files:
    data: str = field(metadata={"help": "scored records: pairs, or lists of any length (.jsonl, .jsonl.gz, .parquet)"})
    output: str = field(metadata={"help": "the folder of the reward model"})
    eval_data: str | None = field(
        default=None, metadata={"help": "scored records on which the model is measured at the end"}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "replace an output that exists; a stopped training of the same settings goes on"},
    )


def short_help() -> Groups:
    """The flags that are ours, and those of transformers' that people use."""
    own = own_flags("rrhf.training.reward_model.config", "RewardModelConfig")
    return {
        "files": flags_of(Files),
        "model": flags_of(ModelSettings),
        "training": [*without(own, SETTLED), *COMMON],
    }


def flags() -> Flags:
    from rrhf.training.reward_model.config import RewardModelConfig

    return Flags([ModelSettings, Files, RewardModelConfig], "reward-model")


def main(arguments: list[str]) -> int:
    if wanted := help_wanted(arguments):
        groups = short_help()
        if wanted == "--help-all":
            from rrhf.training.reward_model.config import RewardModelConfig

            shown = [flag.name for group in groups.values() for flag in group]
            rest = without(flags_of(RewardModelConfig), shown)
            groups = {**groups, "other training arguments of transformers": rest}
        more = "and every other training argument of transformers"
        print(format_help("reward-model", str(__doc__), groups, more), end="")
        raise SystemExit(0)
    from rrhf.training.callbacks import Stopped
    from rrhf.training.reward_model.stage import train_reward_model

    refuse_idle_evaluation(arguments)
    model, files, config = flags().parse(with_output(arguments))
    set_up_logging()
    eval_data = Path(files.eval_data) if files.eval_data else None
    try:
        train_reward_model(Path(files.data), model, config, eval_data=eval_data, overwrite=files.overwrite)
    except Stopped as stopped:
        print(f"rrhf reward-model: {stopped}", file=sys.stderr)
        return stopped.code
    return 0
