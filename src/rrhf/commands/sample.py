"""rrhf sample: queries → responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rrhf.flags import Flags, set_up_logging
from rrhf.models import ModelSettings
from rrhf.sampling.settings import SamplingSettings
from rrhf.stages import sample_file
from rrhf.text import TextSettings


@dataclass(frozen=True)
class Files:
    data: str = field(metadata={"help": "records with queries (.jsonl, .jsonl.gz, .parquet)"})
    output: str = field(metadata={"help": "where the records with responses go"})
    overwrite: bool = field(default=False, metadata={"help": "replace an output that exists"})


def main(arguments: list[str]) -> None:
    flags = Flags([ModelSettings, Files, SamplingSettings, TextSettings], "sample", __doc__)
    model, files, sampling, text = flags.parse(arguments)
    set_up_logging()
    sample_file(Path(files.data), Path(files.output), model, sampling, text, overwrite=files.overwrite)
