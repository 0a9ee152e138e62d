"""The help of a command: its flags in groups, from settings classes, without importing what the command will need."""

from __future__ import annotations
import __future__

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag as the help shows it; ``annotation`` is the type of its field, in Python's words."""

    name: str
    annotation: str
    default: Any
    text: str
    required: bool = False


Groups = Mapping[str, Sequence[Flag]]


def flags_of(settings: type) -> list[Flag]:
    """The flags that the fields of a settings class stand for."""
    return [_flag(field) for field in dataclasses.fields(settings) if field.init]


def _flag(field: dataclasses.Field[Any]) -> Flag:
    default, missing = field.default, dataclasses.MISSING
    if field.default_factory is not missing:
        default = field.default_factory()
    annotation = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    text = " ".join(str(field.metadata.get("help", "")).split())
    return Flag(field.name, annotation, None if default is missing else default, text, required=default is missing)


def chosen(flags: Sequence[Flag], names: Sequence[str]) -> list[Flag]:
    """Those of ``flags`` with these names, in the order of ``names``."""
    by_name = {flag.name: flag for flag in flags}
    return [by_name[name] for name in names]


def without(flags: Sequence[Flag], names: Sequence[str]) -> list[Flag]:
    """Those of ``flags`` that have none of these names."""
    return [flag for flag in flags if flag.name not in names]


def settings_in_source(module: str, name: str) -> type:
    """A dataclass with the fields that class ``name`` itself declares, read from the source of ``module``.

    For a help that must not wait until torch is imported: of the module only imports from the standard library,
    functions and the assignments that need no more are run; modules of the same folder that it imports are read in the
    same way.
    """
    names: dict[str, Any] = {"__name__": module}
    for statement in _statements(module):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return dataclasses.make_dataclass(name, list(_fields(statement, names)), kw_only=True)
        if isinstance(statement, ast.ImportFrom) and any(alias.name == name for alias in statement.names):
            return settings_in_source(str(statement.module), name)
        _run(statement, names, module)
    raise LookupError(f"{module} has no class {name}")


def _statements(module: str) -> list[ast.stmt]:
    package, *below = module.split(".")
    spec = importlib.util.find_spec(package)  # of a module in it, this would import the packages above it
    assert spec is not None and spec.origin is not None, module
    path = Path(spec.origin)
    if below:
        place = path.parent.joinpath(*below)
        path = place / "__init__.py" if place.is_dir() else place.with_name(place.name + ".py")
    return ast.parse(path.read_text(encoding="utf-8"), str(path)).body


def _run(statement: ast.stmt, names: dict[str, Any], module: str) -> None:
    """Run a statement of ``module`` if it needs no import from elsewhere."""
    folder = module.rpartition(".")[0]
    if folder and isinstance(statement, ast.ImportFrom) and str(statement.module).rpartition(".")[0] == folder:
        found = _names(str(statement.module))
        names.update(
            {alias.asname or alias.name: found[alias.name] for alias in statement.names if alias.name in found}
        )
    elif _needs_no_import(statement):
        code = compile(ast.Module([statement], []), module, "exec", __future__.annotations.compiler_flag)
        with contextlib.suppress(NameError):  # it stands on an import that was left out
            exec(code, names)  # nosec B102 # a statement of our own source


@functools.cache
def _names(module: str) -> dict[str, Any]:
    """What ``module`` defines without an import from elsewhere."""
    names: dict[str, Any] = {"__name__": module}
    for statement in _statements(module):
        _run(statement, names, module)
    return names


def _needs_no_import(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return str(statement.module).partition(".")[0] in sys.stdlib_module_names
    if isinstance(statement, ast.Import):
        return all(alias.name.partition(".")[0] in sys.stdlib_module_names for alias in statement.names)
    return isinstance(statement, ast.FunctionDef | ast.Assign | ast.AnnAssign)


def _fields(declaration: ast.ClassDef, names: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for statement in declaration.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            default: Any = dataclasses.field()
            if statement.value is not None:
                default = eval(compile(ast.Expression(statement.value), "<field>", "eval"), names)  # nosec B307 # the same
            yield statement.target.id, ast.unparse(statement.annotation), default


def help_wanted(arguments: Sequence[str]) -> str | None:
    """``"--help"`` or ``"--help-all"`` where one of them is among the arguments."""
    spelled = [argument.replace("_", "-") for argument in arguments]
    if "--help-all" in spelled:
        return "--help-all"
    return "--help" if "--help" in spelled or "-h" in spelled else None


def format_help(command: str, description: str, groups: Groups, more: str = "") -> str:
    """The help of a command; ``more`` says what ``--help-all`` adds, where it adds something."""
    required = [flag for flags in groups.values() for flag in flags if flag.required]
    usage = " ".join([f"rrhf {command}", *(f"--{flag.name} {value_of(flag)}" for flag in required), "[flags]"])
    parser = argparse.ArgumentParser(usage=usage, description=description, add_help=False)
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            group.add_argument(f"--{flag.name}", metavar=value_of(flag), help=words_of(flag).replace("%", "%%"))
    group = parser.add_argument_group("help")
    group.add_argument("-h", "--help", action="help", help="this page")
    if more:
        group.add_argument("--help-all", action="help", help=more)
    return parser.format_help()


def value_of(flag: Flag) -> str:
    """What stands behind the flag."""
    kinds = {"bool": "[true|false]", "list": "VALUE …", "float": "X", "str": "TEXT", "int": "N"}
    return next((value for kind, value in kinds.items() if kind in flag.annotation), "VALUE")


def words_of(flag: Flag) -> str:
    if flag.required:
        return f"{flag.text} (required)"
    if flag.default is None or flag.default is False or flag.default in ("", []) or "default:" in flag.text:
        return flag.text
    default = flag.default
    words = " ".join(map(str, default)) if isinstance(default, list) else str(getattr(default, "value", default))
    return f"{flag.text} (default: {words.lower() if isinstance(default, bool) else words})"
