"""rrhf publish: a model card, an upload to the Hugging Face hub, or a GGUF file for llama.cpp."""

from __future__ import annotations

import argparse
from pathlib import Path

from rrhf.cli.parser import PlainParser
from rrhf.common.errors import UserError
from rrhf.common.remote import origin
from rrhf.models.gguf import WEIGHT_TYPES


def main(arguments: list[str]) -> None:
    parser = PlainParser("publish", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("source", help="a run folder, a model folder, or (to the hub) a file of records")
    files.add_argument("--to", required=True, choices=TARGETS, help="what to make of it")
    files.add_argument("--overwrite", action="store_true", help="replace a file, or a card that rrhf did not write")
    gguf = parser.add_argument_group("--to gguf")
    gguf.add_argument("--output", help="the GGUF file")
    gguf.add_argument("--type", default="f16", choices=list(WEIGHT_TYPES), help="how it holds the weights (f16)")
    hub = parser.add_argument_group("--to hub")
    hub.add_argument("--repo", help="USER/NAME on the hub; it is made where it does not exist")
    hub.add_argument("--private", action="store_true", help="a repository that is made is private")
    hub.add_argument("--message", help="of the hub's commit")
    options = parser.parse_args(arguments)
    made = TARGETS[options.to](options)
    print(origin(made) if isinstance(made, Path) else made)


def _card(options: argparse.Namespace) -> Path:
    from rrhf.report.card import MARK, write_card

    place = write_card(options.source, refresh=not options.overwrite)
    if MARK not in place.read_text(encoding="utf-8"):
        raise UserError(f"{place} was not written by rrhf: give --overwrite to replace it")
    return place


def _gguf(options: argparse.Namespace) -> Path:
    from rrhf.common.logging import set_up_logging
    from rrhf.models.gguf import export_gguf

    if not options.output:
        raise UserError("--output is missing: the GGUF file")
    set_up_logging()
    return export_gguf(options.source, options.output, options.type, options.overwrite)


def _hub(options: argparse.Namespace) -> str:
    from rrhf.report.hub import push_model, push_records

    if not options.repo:
        raise UserError("--repo is missing: USER/NAME on the hub")
    push = push_records if Path(options.source).is_file() else push_model
    return push(options.source, options.repo, private=options.private, message=options.message)


TARGETS = {"card": _card, "gguf": _gguf, "hub": _hub}
