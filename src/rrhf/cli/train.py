"""rrhf train: scored responses → policy. Every training argument of transformers is a flag too."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rrhf.common.errors import UserError
from rrhf.common.flags import Flags
from rrhf.common.logging import set_up_logging
from rrhf.models.adapters import AdapterSettings
from rrhf.models.load import ModelSettings


@dataclass(frozen=True)
class Files:
    data: str = field(metadata={"help": "scored records (.jsonl, .jsonl.gz, .parquet)"})
    output: str | None = field(default=None, metadata={"help": "the folder of the trained model"})
    eval_data: str | None = field(
        default=None, metadata={"help": "scored records that are measured every --eval_steps"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an output that exists"})


def main(arguments: list[str]) -> int:
    from rrhf.report.hub import card_of_training
    from rrhf.training.callbacks import Stopped
    from rrhf.training.config import RRHFConfig
    from rrhf.training.stage import train_model
    from rrhf.training.watch_settings import WatchSettings

    flags = Flags([ModelSettings, Files, AdapterSettings, RRHFConfig, WatchSettings], "train", __doc__)
    model, files, adapter, config, watch = flags.parse(with_output(arguments))
    set_up_logging()
    if not files.output:
        raise UserError("--output is missing: the folder of the trained model")
    try:
        eval_data = Path(files.eval_data) if files.eval_data else None
        train_model(
            Path(files.data),
            model,
            config,
            adapter,
            eval_data=eval_data,
            overwrite=files.overwrite,
            watch=watch,
            saved=partial(card_of_training, token=config.hub_token),
        )
    except Stopped as stopped:
        return stopped.code
    return 0


def with_output(arguments: list[str]) -> list[str]:
    """``--output`` is transformers' ``--output_dir``; its reduced-precision flags need the device to be known first."""
    for i, argument in enumerate(arguments):
        if argument == "--output" and i + 1 < len(arguments):
            return [*arguments, f"--output_dir={arguments[i + 1]}"]
        if argument.startswith("--output="):
            return [*arguments, f"--output_dir={argument.partition('=')[2]}"]
    return arguments
