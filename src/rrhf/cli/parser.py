"""What the commands' modules share: a flag is the field of a settings class, so it means the same everywhere.

A command's module imports neither torch nor transformers before its arguments are read: its help must not wait.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from rrhf.common.errors import UserError
from rrhf.common.flag_help import Groups, format_help, help_wanted


class PlainParser(argparse.ArgumentParser):
    """argparse for the light commands, which must not wait for transformers; faults are for the user to mend."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(prog=f"rrhf {command}", description=description, allow_abbrev=False, add_help=False)
        flags = ("-h", "--help", "--help-all")
        self.add_argument_group("help").add_argument(*flags, action="help", help="this page")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the flags")

    def format_help(self) -> str:
        self._action_groups.sort(key=lambda group: group.title == "help")  # the last, as in the other commands
        return super().format_help()


def show_help(arguments: Sequence[str], command: str, description: str | None, groups: Groups) -> None:
    """Print the command's help, and end, where the arguments ask for it."""
    if help_wanted(arguments) is not None:
        print(format_help(command, description or "", groups), end="")
        raise SystemExit(0)
