"""rrhf convert: other data sets → records."""

from __future__ import annotations

import sys
from collections import Counter

from rrhf.cli.parser import PlainParser
from rrhf.common.presentation import describe_counts
from rrhf.common.progress import progress
from rrhf.records.files import write_records
from rrhf.records.formats import FORMATS, load_dataset_records


def main(arguments: list[str]) -> None:
    parser = PlainParser("convert", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("source", help="a file, a folder, or a data set's id on the Hugging Face hub")
    files.add_argument("--output", required=True, help="records (.jsonl, .jsonl.gz, .parquet)")
    files.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--format", help=f"one of {', '.join(FORMATS)}, or pkg.module:function; default: by its columns")
    rows.add_argument("--split", default="train", help="split of a hub data set (default: train)")
    rows.add_argument("--limit", type=int, help="at most this many records")
    options = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    records = load_dataset_records(options.source, options.format, options.split, options.limit, counts)
    written = write_records(options.output, progress(records, "convert", unit="records"), options.overwrite)
    dropped = f"; {describe_counts(counts)}" if counts else ""
    print(f"{written} records in {options.output}{dropped}", file=sys.stderr)
