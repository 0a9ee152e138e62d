"""rrhf sample: queries → responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rrhf.cli.parser import show_help
from rrhf.cluster.settings import ClusterSettings
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.common.flag_help import Groups, flags_of
from rrhf.common.flags import Flags
from rrhf.common.logging import set_up_logging
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.recipes.config import SourceSettings
from rrhf.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class Files:
    data: str = field(metadata={"help": "records with queries (.jsonl, .jsonl.gz, .parquet)"})
    output: str = field(metadata={"help": "where the records with responses go"})
    overwrite: bool = field(default=False, metadata={"help": "replace an output that exists"})


@dataclass(frozen=True)
class SampledModel(ModelSettings):
    """``--model`` has no place where ``--source`` says where responses come from."""

    model: str = field(
        default="",
        metadata={
            "help": "hub id, local folder, GGUF file, or package:NAME/FILE; not with --source, which has models too"
        },
    )


def short_help() -> Groups:
    return {
        "files": flags_of(Files),
        "model": flags_of(SampledModel),
        "sampling": flags_of(SamplingSettings),
        "text": flags_of(TextSettings),
        "other sources, and what servers may cost": [*flags_of(SourceSettings), *flags_of(EndpointLimits)],
        "on a cluster": flags_of(ClusterSettings),
    }


def flags() -> Flags:
    kinds = [SampledModel, Files, SourceSettings, SamplingSettings, TextSettings, EndpointLimits, ClusterSettings]
    return Flags(kinds, "sample")


def main(arguments: list[str]) -> None:
    show_help(arguments, "sample", __doc__, short_help())
    from rrhf.cluster.pool import open_pool
    from rrhf.sampling.stage import sample_file

    model, files, source, sampling, text, remote, cluster = flags().parse(arguments)
    if model.model and source.source:
        raise UserError(
            "--model: is asked nothing where --source says what answers: write it as a --source too, MODEL@POLICY:N, "
            "or leave it out"
        )
    set_up_logging()
    sample_file(
        Path(files.data),
        Path(files.output),
        model,
        sampling,
        text,
        sources=source.source,
        remote=remote,
        overwrite=files.overwrite,
        pool=open_pool(cluster, model.device),
    )
