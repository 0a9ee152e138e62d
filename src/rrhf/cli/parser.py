"""One module a command. Flags are the fields of settings classes, so a flag means the same everywhere."""

from __future__ import annotations

import argparse
from typing import NoReturn

from rrhf.common.errors import UserError


class PlainParser(argparse.ArgumentParser):
    """argparse for the light commands, which must not wait for transformers; faults are for the user to mend."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(prog=f"rrhf {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the flags")
