"""rrhf report: one HTML page of one run or several, side by side."""

from __future__ import annotations

from pathlib import Path

from rrhf.cli.parser import PlainParser
from rrhf.common.files import refuse_existing
from rrhf.common.remote import origin
from rrhf.report import write_report


def main(arguments: list[str]) -> None:
    parser = PlainParser("report", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "runs", nargs="+", help="folders of runs (one in rounds: round by round), trainings or baselines"
    )
    beside = "shown beside them: JSON files of rrhf judge, rrhf arena results, rrhf evaluate --pairs, rrhf reward-model"
    files.add_argument("--results", nargs="+", action="extend", default=[], metavar="FILE", help=beside)
    files.add_argument("--output", required=True, help="the page (.html)")
    files.add_argument("--overwrite", action="store_true", help="replace a page that exists")
    options = parser.parse_args(arguments)
    refuse_existing(options.output, options.overwrite)
    write_report([Path(run) for run in options.runs], Path(options.output), options.results)
    print(origin(options.output))
