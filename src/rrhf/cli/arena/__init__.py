"""rrhf arena: people compare the responses of several systems, blind, on a page in their browser."""

from __future__ import annotations

import importlib
import importlib.util

from rrhf.common.errors import UserError, nearest
from rrhf.common.flag_help import help_wanted

# name → what the overview says of it; each is a module here, whose ``main(arguments, name)`` is the command.
ACTIONS = {
    "create": "a study: which pairs, which raters, who sees what; prints the personal links",
    "serve": "the pages of a study, until it is stopped",
    "results": "who wins, how far raters agree, whom not to believe; votes as training data",
    "links": "new personal links, for raters who lost theirs or come later",
}
LIBRARIES = ("limits", "markdown_it", "sqlalchemy", "starlette", "uvicorn")  # of the extra `arena`


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "--help-all", "help"):
        print(_overview())
        raise SystemExit(0)
    name, *rest = arguments
    if name not in ACTIONS:
        raise UserError(f"unknown arena command {name!r}: {nearest(name, ACTIONS)}")
    missing = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
    if missing and not help_wanted(rest):
        raise UserError(f"the arena needs {', '.join(missing)}: pip install 'rrhf[arena]'")
    module = importlib.import_module(f"rrhf.cli.arena.{name}")
    return int(module.main(rest, f"arena {name}") or 0)


def _overview() -> str:
    width = max(map(len, ACTIONS))
    lines = [f"  rrhf arena {name:<{width}}  {text}" for name, text in ACTIONS.items()]
    more = ["", "rrhf arena COMMAND --help says more; docs/arena.md has a study from its beginning to its end."]
    return "\n".join(["usage: rrhf arena COMMAND STUDY [flags]", "", str(__doc__), "", *lines, *more])
