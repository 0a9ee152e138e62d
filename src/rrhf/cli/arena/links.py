"""rrhf arena links: new personal links of a study; the ones before open nothing any more."""

from __future__ import annotations

from rrhf.cli.parser import PlainParser
from rrhf.common.errors import UserError


def main(arguments: list[str], name: str) -> None:
    parser = PlainParser(name, __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("study", help="what `rrhf arena create` made")
    people = parser.add_argument_group("people")
    people.add_argument("names", nargs="*", help="raters; owner is who runs the study")
    people.add_argument("--add", nargs="+", default=[], metavar="NAME", help="raters who come later")
    options = parser.parse_args(arguments)
    if not options.names and not options.add:
        raise UserError("name raters, or give --add NAME")
    from rrhf.arena.store import add_rater, new_link, open_study
    from rrhf.arena.urls import link

    with open_study(options.study) as study:
        for person in options.names:
            print(f"{person}\t{link(study.url, new_link(study, person))}")
        for person in options.add:
            print(f"{person}\t{link(study.url, add_rater(study, person))}")
