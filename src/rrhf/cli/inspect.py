"""rrhf inspect: k, lengths, duplicates, diversity and scores of a file of records."""

from __future__ import annotations

from rrhf.cli.parser import PlainParser
from rrhf.common.files import refuse_existing, write_text
from rrhf.common.progress import progress
from rrhf.common.remote import origin
from rrhf.records.files import count_records, read_records
from rrhf.records.inspection import format_inspection, inspect_records, inspection_html


def main(arguments: list[str]) -> None:
    parser = PlainParser("inspect", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("file", help="records (.jsonl, .jsonl.gz, .parquet)")
    files.add_argument("--html", help="write a page as well")
    files.add_argument("--overwrite", action="store_true", help="replace a page that exists")
    options = parser.parse_args(arguments)
    if options.html:
        refuse_existing(options.html, options.overwrite)
    records = progress(read_records(options.file), "inspect", count_records(options.file), "records")
    result = inspect_records(records)
    print(format_inspection(result))
    if options.html:
        write_text(options.html, inspection_html(result, origin(options.file)))
        print(f"page: {origin(options.html)}")
