"""rrhf convert: other data sets → records, and scored records → rows for other trainers."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections import Counter

from rrhf.cli.parser import PlainParser
from rrhf.common.errors import UserError
from rrhf.common.presentation import describe_counts
from rrhf.common.progress import progress
from rrhf.common.remote import origin
from rrhf.records.export import EXPORTS, PAIRS, describe_export, exported
from rrhf.records.files import write_records, write_rows
from rrhf.records.foreign.ratings import weighted
from rrhf.records.formats import FORMATS, load_dataset_records


def main(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    if options.pairing and not options.to:
        raise UserError(f"--pairing {options.pairing}: chooses pairs for another trainer: give --to as well")
    if options.queries_only and (options.to or options.weights):
        raise UserError("--queries_only: leaves no responses for --to and --weights: leave these out")
    counts: Counter[str] = Counter()
    records = load_dataset_records(
        options.source, options.format, options.split, options.limit, counts, queries_only=options.queries_only
    )
    if options.weights:
        if len(dict(options.weights)) < len(options.weights):
            raise UserError("--weights: a name stands there twice")
        records = (weighted(record, dict(options.weights)) for record in records)
    if options.to is None:
        written = write_records(options.output, progress(records, "convert", unit="records"), options.overwrite)
    else:
        rows = exported(records, options.to, options.pairing or "all", counts)
        written = write_rows(options.output, progress(rows, "convert", unit="rows"), options.overwrite)
    dropped = f"; {describe_counts(counts)}" if counts else ""
    print(f"{written} {'rows' if options.to else 'records'} in {origin(options.output)}{dropped}", file=sys.stderr)


def _parser() -> PlainParser:
    parser = PlainParser("convert", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("source", help="a file, a folder, or a data set's id on the Hugging Face hub")
    files.add_argument(
        "--output", required=True, help="records (.jsonl, .jsonl.gz, .parquet); rows (.jsonl, .jsonl.gz)"
    )
    files.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--format", help=f"one of {', '.join(FORMATS)}, or pkg.module:function; default: by its columns")
    rows.add_argument("--split", default="train", help="split of a hub data set (default: train)")
    rows.add_argument("--limit", type=int, help="at most this many records")
    rows.add_argument(
        "--queries_only", "--queries-only", action="store_true",
        help="without the responses that the data bring, which `rrhf sample` would keep",
    )  # fmt: skip
    rows.add_argument(
        "--weights", nargs="+", type=_weight, metavar="NAME=X",
        help="score by the sum of these ratings in the data (rewards of the records), each times its weight",
    )  # fmt: skip
    out = parser.add_argument_group("for other trainers")
    out.add_argument("--to", help=". ".join(f"{name}: {describe_export(export)}" for name, export in EXPORTS.items()))
    pairs = ". ".join(f"{name}: {describe_export(choose)}" for name, choose in PAIRS.items())
    out.add_argument("--pairing", help=f"which pairs of a record. {pairs} (default: all)")
    return parser


def _weight(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        return name, float(number)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: write NAME=X, such as helpfulness=0.65") from error
