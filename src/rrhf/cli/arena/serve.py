"""rrhf arena serve: the pages of a study on this machine, or for others, until it is stopped."""

from __future__ import annotations

from dataclasses import fields, replace
from urllib.parse import urlsplit

from rrhf.arena.settings import LimitSettings
from rrhf.cli.parser import PlainParser
from rrhf.common.errors import UserError


def main(arguments: list[str], name: str) -> None:
    options = _parser(name).parse_args(arguments)
    limits = LimitSettings(**{field.name: getattr(options, field.name) for field in fields(LimitSettings)})
    from rrhf.arena.app import listen, serve
    from rrhf.arena.database import name_of
    from rrhf.arena.store import open_study
    from rrhf.arena.urls import host_of, is_loopback, site

    with open_study(options.study) as study:
        if options.url:
            study = replace(study, url=site(options.url))
        if not is_loopback(options.host) and is_loopback(host_of(study.url)):
            raise UserError(
                f"--host {options.host} opens the pages to other machines: give --url, the address at which they reach "
                "them (https behind a server that has a certificate: the links are the raters' only secret)"
            )
        local = is_loopback(host_of(study.url))
        port = options.port if options.port is not None else (urlsplit(study.url).port if local else None) or 8000
        place = listen(options.host, port)
        if local and not options.url:  # the links that the owner makes are of where the pages are
            host = f"[{options.host}]" if ":" in options.host else options.host
            study = replace(study, url=f"http://{host}:{place.getsockname()[1]}")
        print(f"{study.url}: serving {name_of(options.study)}; Ctrl-C stops, every answer is kept", flush=True)
        serve(study, limits, place)


def _parser(name: str) -> PlainParser:
    parser = PlainParser(name, __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("study", help="what `rrhf arena create` made: a file, or postgresql://USER@HOST/DATABASE")
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, which only this machine reaches)"
    )
    network.add_argument("--port", type=int, help="0 takes a free one (default: that of the study's address, or 8000)")
    network.add_argument("--url", default="", help="the address at which raters reach the pages (default: as created)")
    for field in fields(LimitSettings):
        flag = f"--{field.name}"
        network.add_argument(
            flag, flag.replace("_", "-"), dest=field.name, type=int, default=field.default,
            help=f"{field.metadata['help']} (default: {field.default})",
        )  # fmt: skip
    return parser
