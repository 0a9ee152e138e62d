"""rrhf baseline sft: fine-tune on one response a query. It is RRHF without its ranking loss: the same trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from rrhf.cli import train
from rrhf.common.errors import UserError
from rrhf.common.flag_help import Groups, format_help, help_wanted, without
from rrhf.common.flags import Flags
from rrhf.common.logging import set_up_logging

BEST = "best"
DATA = "records with responses, and with scores where the best is fitted (.jsonl, .jsonl.gz, .parquet)"
ONLINE = ("resample_steps", "kl_target")  # flags of a training that samples


@dataclass(frozen=True)
class Sft:
    fit: str = field(
        default=BEST,
        metadata={"help": "which response of a query: best, the one with the highest score, or the tag of a source, "
                          "such as human/chosen, which needs no scores"},
    )  # fmt: skip


def short_help() -> Groups:
    from rrhf.common.flag_help import flags_of

    groups = {
        title: without(flags, ONLINE) for title, flags in train.short_help().items() if "--resample_steps" not in title
    }
    groups["files"] = [replace(flag, text=DATA) if flag.name == "data" else flag for flag in groups["files"]]
    return {"files": groups["files"], "what is fitted": flags_of(Sft), **groups}


def main(arguments: list[str], name: str) -> int:
    if help_wanted(arguments):
        print(format_help(name, str(__doc__), short_help()), end="")
        raise SystemExit(0)
    if sampling := train.given(arguments, ONLINE):
        raise UserError(
            f"--{sampling[0]} is for responses that are sampled while training, and fine-tuning fits the data's: "
            "leave it out, or `rrhf train`"
        )
    train.refuse_idle_adapter(arguments)
    train.refuse_idle_evaluation(arguments)
    train.refuse_idle_limits(arguments, "watch_steps")
    settings = [*train.flags(online=False).settings, Sft]
    files, adapter, model, config, watch, remote, cluster, sft = Flags(settings, name).parse(
        ["--ranking_loss", "none", *train.with_output(arguments)]
    )
    if config.ranking_loss != "none":
        raise UserError(
            f"--ranking_loss {config.ranking_loss}: fine-tuning alone has none: leave it out, or `rrhf train`"
        )
    if not config.sft_weight > 0:
        raise UserError(f"--sft_weight {config.sft_weight:g}: nothing would be learnt: leave it out")
    set_up_logging()
    data = Path(files.data)
    if sft.fit != BEST:
        from rrhf.recipes.baselines.sft import write_responses_of

        beside = Path(f"{Path(files.output)}-data.jsonl")  # not in it where the name ends in a slash
        data = write_responses_of(sft.fit, data, beside)
    return train.carry_out(data, model, files, adapter, config, watch, cluster=cluster, remote=remote)
