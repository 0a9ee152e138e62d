"""rrhf score: responses → scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rrhf.cli.parser import show_help
from rrhf.cluster.settings import ClusterSettings
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.flag_help import Groups, flags_of
from rrhf.common.flags import Flags
from rrhf.common.logging import set_up_logging
from rrhf.models.tokenization import TextSettings
from rrhf.rewards.stage import RewardSettings, ScoringSettings, score_file


@dataclass(frozen=True)
class Files:
    data: str = field(metadata={"help": "records with responses (.jsonl, .jsonl.gz, .parquet)"})
    output: str = field(metadata={"help": "where the scored records go"})
    overwrite: bool = field(default=False, metadata={"help": "replace an output that exists"})
    dry_run: bool = field(
        default=False, metadata={"help": "say what judges would be asked and what that would cost; ask nothing"}
    )


def short_help() -> Groups:
    return {
        "files": flags_of(Files),
        "rewards": flags_of(RewardSettings),
        "what rewards need": flags_of(ScoringSettings),
        "text, for rewards that are policies": flags_of(TextSettings),
        "judges, and what they may cost": flags_of(EndpointLimits),
        "on a cluster": flags_of(ClusterSettings),
    }


def flags() -> Flags:
    return Flags([RewardSettings, Files, ScoringSettings, TextSettings, EndpointLimits, ClusterSettings], "score")


def main(arguments: list[str]) -> None:
    show_help(arguments, "score", __doc__, short_help())
    from rrhf.cluster.pool import open_pool

    reward, files, scoring, text, remote, cluster = flags().parse(arguments)
    set_up_logging()
    if files.dry_run:
        from rrhf.rewards.judges.reward import describe_estimate

        print(describe_estimate(reward.reward, Path(files.data), scoring.context(text, remote)))
        return
    pool = open_pool(cluster, scoring.device)
    score_file(
        Path(files.data), Path(files.output), reward, scoring, text, remote, overwrite=files.overwrite, pool=pool
    )
