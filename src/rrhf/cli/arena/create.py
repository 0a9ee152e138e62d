"""rrhf arena create: a study of two or more systems' responses to the same queries, and the personal links to it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rrhf.arena.settings import StudySettings
from rrhf.cli.parser import PlainParser
from rrhf.common.errors import UserError

URL = "http://127.0.0.1:8000"


def main(arguments: list[str], name: str) -> None:
    options = _parser(name).parse_args(arguments)
    design = StudySettings(**{field.name: getattr(options, field.name) for field in fields(StudySettings)})
    raters = _raters(options.raters)
    from rrhf.arena.store import check_names, create_study
    from rrhf.arena.systems import comparisons, read_systems
    from rrhf.arena.urls import link, site

    check_names(raters)
    url = site(options.url)
    systems = read_systems(options.data)
    asked = comparisons(systems, options.compare) if design.mode == "pairs" else []
    tokens = create_study(options.study, systems, asked, raters, design, url)
    print(_summary(options.study, systems.responses, asked))
    for person, token in tokens.items():
        print(f"{person}\t{link(url, token)}")
    print("\nThe links are shown this once; each lets in whoever has it. The pages: rrhf arena serve " + options.study)


def _summary(place: str, responses: dict[str, dict[str, str]], asked: list[tuple[str, str]]) -> str:
    from rrhf.arena.store import open_study, progress

    with open_study(place) as study:
        tasks = list(study.tasks.values())
        sizes = sorted({person.assigned for person in progress(study)})
    checks = [task for task in tasks if task.spoilt is not None]
    rated = [task for task in tasks if task.spoilt is None]
    lines = [f"{place}: {len(responses)} systems: {', '.join(responses)}"]
    for a, b in asked:
        mine = [task for task in rated if task.systems == (a, b)]
        equal = sum(responses[a][task.query].strip() == responses[b][task.query].strip() for task in mine)
        lines.append(f"  {a} against {b}: {len(mine)} pairs" + (f", {equal} of them of equal texts" if equal else ""))
    what = f"{len(rated)} {'pairs' if asked else 'queries'}, {sum(task.common for task in rated)} seen by every rater"
    each = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
    more = f", {len(checks)} of them attention checks" if checks else ""
    return "\n".join([*lines, f"  {what}; {each} a rater{more}", ""])


def _raters(asked: list[str]) -> list[str]:
    if len(asked) > 1 or not asked[0].removeprefix("-").isdecimal():
        return asked
    if not 1 <= int(asked[0]) <= 10_000:
        raise UserError(f"--raters {asked[0]}: from 1 to 10000, or names")
    return [f"rater-{number}" for number in range(1, int(asked[0]) + 1)]


def _parser(name: str) -> PlainParser:
    parser = PlainParser(name, __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("study", help="a file to be made, or postgresql://USER@HOST/DATABASE")
    files.add_argument(
        "--data", action="append", required=True, metavar="[NAME=]FILE",
        help="a system's responses (.jsonl, .jsonl.gz, .parquet), named by the file; once a system. A file with "
        "several responses a record holds a system a source. Records belong together by id, or else by query",
    )  # fmt: skip
    people = parser.add_argument_group("people")
    people.add_argument("--raters", nargs="+", default=["3"], metavar="NAME", help="names, or how many (default: 3)")
    people.add_argument("--url", default=URL, help=f"the address at which raters reach the pages (default: {URL})")
    design = parser.add_argument_group("design")
    design.add_argument(
        "--compare", action="append", default=[], metavar="A:B", help="two systems; again for more (default: each pair)"
    )
    for field in fields(StudySettings):
        kind: Any = int if field.type == "int" else str
        flag, text = f"--{field.name}", field.metadata["help"]
        shown = f"{text} (default: {field.default})" if field.default != "" else text
        spellings = dict.fromkeys((flag, flag.replace("_", "-")))
        design.add_argument(*spellings, dest=field.name, type=kind, default=field.default, help=shown)
    return parser
