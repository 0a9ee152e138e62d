"""Command-line flags and configuration keys from settings classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from rrhf.common.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import HfArgumentParser

SEEDS = range(2**32)  # that every library here takes


class Flags:
    """transformers' parser of settings classes, strict: no abbreviations, unknown flags named with the nearest one.

    A flag that several classes have is one flag, whose value all of them get; its help and default are the last one's.
    """

    def __init__(self, settings: Sequence[type], command: str) -> None:
        self.settings, self.command = list(settings), f"rrhf {command}"

    @cached_property
    def parser(self) -> HfArgumentParser:
        # Imported on first use: a command's help must not wait for transformers.
        from transformers import HfArgumentParser
        from transformers.hf_argparser import string_to_bool

        def boolean(text: str) -> bool:
            return string_to_bool({"on": "true", "off": "false"}.get(text.lower(), text))

        class Parser(HfArgumentParser):
            def error(self, message: str) -> NoReturn:
                raise UserError(f"{message}; `{self.prog} --help` lists the flags")

        parser = Parser(self.settings, prog=self.command, allow_abbrev=False, add_help=False,
                        conflict_handler="resolve")  # fmt: skip
        for action in parser._actions:
            if action.nargs == "+" and not action.required:
                action.nargs = "*"  # an empty list is a value too
            if action.type is string_to_bool:
                action.type = boolean
        return parser

    def known(self) -> list[str]:
        """Every flag in its spelling with underscores."""
        return [name for action in self.parser._actions for name in action.option_strings if "-" not in name[2:]]

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """One instance a settings class.

        Raises:
            UserError: an unknown flag, a missing one, or a value that does not fit.
        """
        for argument in arguments:  # argparse takes the hyphens for no value at all
            if argument == "--" or argument.endswith("=--"):
                raise UserError(f"{argument}: two hyphens are no value; `{self.command} --help` lists the flags")
        namespace, rest = self.parser.parse_known_args(list(arguments))
        if rest:
            flag = rest[0].partition("=")[0]
            if flag.startswith("-"):
                raise UserError(f"unknown flag {flag}: {_suggest(flag, self.known())}")
            raise UserError(f"unexpected argument {rest[0]!r}; `{self.command} --help` lists the flags")
        values = vars(namespace)
        self._refuse_unfit(values)
        return tuple(kind(**{f.name: values[f.name] for f in fields(kind) if f.init}) for kind in self.settings)

    def _refuse_unfit(self, values: Mapping[str, Any]) -> None:
        faults = [
            f"--{name} {values[name]}: must lie between 0 and {SEEDS[-1]}"
            for name in ("seed", "data_seed")
            if values.get(name) is not None and values[name] not in SEEDS
        ]
        # Paths that are empty would be this folder.
        faults += [f"--{a.dest}: is empty" for a in self.parser._actions if a.required and values[a.dest] == ""]
        if faults:
            raise UserError("\n".join(faults))


def _suggest(flag: str, known: list[str]) -> str:
    text = nearest(flag.replace("-", "_").replace("__", "--", 1), known)
    return text if len(known) < 30 else f"{text.partition('known:')[0]}see --help"


def as_arguments(section: Mapping[str, Any], where: str) -> list[str]:
    """The flags that a section of a configuration stands for; ``null`` leaves a key at its default.

    Raises:
        UserError: a value no flag can take.
    """
    arguments = []
    for key, value in section.items():
        if value is None:
            continue
        if isinstance(value, list):
            for entry in value:
                if str(entry).startswith("-") and not isinstance(entry, (int, float)):
                    raise UserError(f"{where}: {key}: {entry!r}: an entry of a list cannot begin with a hyphen")
            arguments += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            arguments += [f"--{key}", json.dumps(value)]
        elif isinstance(value, (str, bool, int, float)):
            arguments += [f"--{key}={value}"]
        else:
            raise UserError(f"{where}: {key}: a value of type {type(value).__name__} is not understood")
    return arguments
