"""rrhf arena results: who wins in a study, how far its raters agree, whom not to believe; and its votes as records."""

from __future__ import annotations

import json

from rrhf.cli.parser import PlainParser
from rrhf.common.errors import UserError
from rrhf.common.files import refuse_existing, write_text
from rrhf.common.remote import origin


def main(arguments: list[str], name: str) -> None:
    options = _parser(name).parse_args(arguments)
    outputs = [path for path in (options.output, options.markdown, options.votes, options.export) if path]
    for path in outputs:
        refuse_existing(path, options.overwrite)
    if options.samples < 1:
        raise UserError(f"--samples {options.samples}: must be at least 1")
    if options.to and not options.export:
        raise UserError(f"--to {options.to}: give --export, the file for the rows")
    from rrhf.arena.database import name_of
    from rrhf.arena.machines import machine_labels, study_records
    from rrhf.arena.results import study_results
    from rrhf.arena.results_text import format_results, markdown_results
    from rrhf.arena.store import open_study, progress, rankings, said, votes
    from rrhf.records.files import write_records, write_rows

    with open_study(options.study) as study:
        systems, told, ranked, whole = study.systems, votes(study), rankings(study), said(study)
        skipped = {person.rater.name: person.skipped for person in progress(study)}
        texts = {query: (one.query, one.responses) for query, one in study.texts.items()}
    strangers = [person for person in options.without if person not in skipped]
    if strangers:
        raise UserError(f"--without {' '.join(strangers)}: the study's raters are {', '.join(skipped)}")
    records = study_records(texts, systems)
    results = study_results(
        told, ranked, systems=systems, judges=machine_labels(records, options.scores), without=options.without,
        skipped=skipped, seed=options.seed, samples=options.samples,
    )  # fmt: skip
    print(format_results(results))
    if options.output:
        numbers = {"study": name_of(options.study), "seed": options.seed, **results}
        write_text(options.output, json.dumps(numbers, ensure_ascii=False, indent=2) + "\n")
    if options.markdown:
        write_text(options.markdown, markdown_results(results) + "\n")
    if options.votes:
        write_rows(options.votes, whole, options.overwrite)
    if options.export:
        from rrhf.arena.export import voted_records
        from rrhf.records.export import exported

        voted = voted_records(records, told, ranked, aggregate=options.aggregate, without=options.without)
        if options.to:
            written = write_rows(options.export, exported(voted, options.to, options.pairing), options.overwrite)
        else:
            written = write_records(options.export, voted, options.overwrite)
        print(f"\n{written} {'rows' if options.to else 'records'} in {origin(options.export)}")


def _parser(name: str) -> PlainParser:
    from rrhf.records.export import EXPORTS, PAIRS, describe_export
    from rrhf.rewards.people import AGGREGATES

    parser = PlainParser(name, __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("study", help="the study's file, or postgresql://USER@HOST/DATABASE")
    files.add_argument("--output", metavar="F.json", help="all numbers")
    files.add_argument("--markdown", metavar="F.md", help="the tables")
    files.add_argument("--votes", metavar="F.jsonl", help="every vote or ranking as it was given, with its remark")
    files.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    numbers = parser.add_argument_group("numbers")
    numbers.add_argument(
        "--scores", nargs="+", default=[], metavar="F",
        help="hold raters against machines: the study's responses scored by `rrhf score`, or ….comparisons.jsonl of "
        "`rrhf judge`",
    )  # fmt: skip
    numbers.add_argument("--without", nargs="+", default=[], metavar="RATER", help="whose word does not count")
    numbers.add_argument("--seed", type=int, default=0, help="of the bootstraps and shuffles (default: 0)")
    numbers.add_argument("--samples", type=int, default=200, help="refits of the strengths (default: 200)")
    out = parser.add_argument_group("votes as training data")
    out.add_argument("--export", metavar="F", help="scored records (.jsonl, .jsonl.gz, .parquet), or rows with --to")
    out.add_argument(
        "--aggregate", default="mean", choices=list(AGGREGATES),
        help="how votes become scores, query by query; plackett-luce, of pairs, is Bradley-Terry (default: mean)",
    )  # fmt: skip
    out.add_argument("--to", help=". ".join(f"{key}: {describe_export(export)}" for key, export in EXPORTS.items()))
    pairs = ". ".join(f"{key}: {describe_export(choose)}" for key, choose in PAIRS.items())
    out.add_argument("--pairing", default="all", help=f"which pairs of a record, with --to. {pairs} (default: all)")
    return parser
