"""What the commands' modules share: a flag is the field of a settings class, so it means the same everywhere.

A command's module imports neither torch nor transformers before its arguments are read: its help must not wait.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from rrhf.common.errors import UserError
from rrhf.common.flag_help import Groups, flags_of, format_help, help_wanted, value_of, words_of


class PlainParser(argparse.ArgumentParser):
    """argparse for the light commands, which must not wait for transformers; faults are for the user to mend."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(prog=f"rrhf {command}", description=description, allow_abbrev=False, add_help=False)
        flags = ("-h", "--help", "--help-all")
        self.add_argument_group("help").add_argument(*flags, action="help", help="this page")

    def error(self, message: str) -> NoReturn:
        message = message.removesuffix(", overrides")  # those that may be left out, which argparse names too
        raise UserError(f"{message}; `{self.prog} --help` lists the flags")

    def parse_args(self, *given: Any) -> Any:  # type: ignore[override]
        return self._without_empty_paths(super().parse_args(*given))

    def parse_intermixed_args(self, *given: Any) -> Any:  # type: ignore[override]
        return self._without_empty_paths(super().parse_intermixed_args(*given))

    def _without_empty_paths(self, options: argparse.Namespace) -> argparse.Namespace:
        """Refuse texts that are empty where they name a file or a folder: the empty path is the current folder."""
        paths = [a for a in self._actions if a.dest == "output" or a.required or not a.option_strings]
        for action in paths:
            value = getattr(options, action.dest, None)
            if "" in (value if isinstance(value, list) else [value]):
                self.error(f"{action.option_strings[0] if action.option_strings else action.dest} is empty")
        return options

    def format_help(self) -> str:
        self._action_groups.sort(key=lambda group: group.title == "help")  # the last, as in the other commands
        return super().format_help()


def add_flags(group: argparse._ArgumentGroup, settings: type) -> None:
    """The flags of a settings class, whose fields are texts and numbers, for a command without transformers' parser."""
    for flag in flags_of(settings):
        kind = next((kind for name, kind in (("int", int), ("float", float)) if name in flag.annotation), str)
        group.add_argument(
            f"--{flag.name}", type=kind, default=flag.default, metavar=value_of(flag), help=words_of(flag)
        )
        if "_" in flag.name:  # the other spelling
            spelling = f"--{flag.name.replace('_', '-')}"
            group.add_argument(spelling, dest=flag.name, type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def show_help(arguments: Sequence[str], command: str, description: str | None, groups: Groups) -> None:
    """Print the command's help, and end, where the arguments ask for it."""
    if help_wanted(arguments) is not None:
        print(format_help(command, description or "", groups), end="")
        raise SystemExit(0)
