"""Modules by name: one way to find ``pkg.module:function``, whatever it is for, and what an extra brings."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rrhf.common.errors import UserError, nearest

T = TypeVar("T")

# Modules that moved; names of before stand in records and configurations and go on to be found.
MOVED = {
    "rrhf.demo.classifiers": "rrhf.recipes.demo.classifiers",
    "rrhf.demo.data": "rrhf.recipes.demo.data",
}


def load_function(name: str, what: str, usage: str = "") -> Callable[..., Any]:
    """Import ``pkg.module:function``; modules of the current folder are found too.

    A callable object and an async function are as good as a function, and ``module:object.method`` is followed.

    Args:
        name: what the user wrote.
        what: what it is to be, for messages: "reward", "format", "data source".
        usage: how the function is called, for the message that it cannot be.

    Raises:
        UserError: no such module or attribute, the module cannot be imported, or what is there cannot be called.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise UserError(f"{what} {name!r}: write it as pkg.module:function")
    value: Any = _module(MOVED.get(module_name, module_name), f"{what} {name!r}")
    for attribute in path.split("."):
        if not hasattr(value, attribute):
            own = (key for key, held in vars(value).items() if callable(held)) if hasattr(value, "__dict__") else ()
            known = [key for key in own if not key.startswith("_")]
            raise UserError(f"{what} {name!r}: {module_name} has no {attribute!r}: {nearest(attribute, known)}")
        value = getattr(value, attribute)
    if inspect.isclass(value) or not callable(value):
        kind = "a class" if inspect.isclass(value) else type(value).__name__
        cure = f": name {usage}" if usage else ": name a function"
        raise UserError(f"{what} {name!r} is {kind}, not a function{cure}, or an object that can be called so")
    return value


def call_own(function: Callable[..., T], what: str, *arguments: Any, passing: type[Exception] = UserError) -> T:
    """Call a function of the user's, named ``what`` in messages; exceptions of the type ``passing`` are let through.

    Raises:
        UserError: it failed; the message says how, and in which line.
    """
    try:
        return function(*arguments)
    except (UserError, passing):
        raise
    except Exception as error:
        raise UserError(f"{what} failed: {last_line(error)}") from error


def of_extra(module: str, missing: str) -> Any:
    """A module that an extra installs, imported where it is needed.

    Args:
        module: its name.
        missing: what needs it and how to install it, for the message.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(missing) from error


def _module(module_name: str, where: str) -> Any:
    folder = str(Path.cwd())  # a module beside the data is found as `python -m` would find it
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(f"{where}: {module_name} needs the module {error.name!r}: install it") from error
        raise UserError(
            f"{where}: no module {error.name!r} here or among the installed ones{_similar_module(error.name)}; "
            "run from the folder that has it, or install it"
        ) from error
    except Exception as error:
        raise UserError(f"{where}: importing {module_name} failed: {last_line(error)}") from error


def _similar_module(name: str) -> str:
    parent, _, last = name.rpartition(".")
    folders = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    known = [module.name for module in pkgutil.iter_modules(folders)]
    close = difflib.get_close_matches(last, known, n=1, cutoff=0.6)
    return f" (did you mean {parent + '.' if parent else ''}{close[0]}?)" if close else ""


def last_line(error: BaseException) -> str:
    """What failed and where: the error with the innermost line of code, outside the libraries if there is one."""
    what = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "<frozen" not in frame.filename]
    for frame in reversed(own or frames):
        return f"{what} (in {frame.name}, {frame.filename}, line {frame.lineno})"
    return what


def code_digest(function: Callable[..., Any]) -> str:
    """16 hexadecimal digits of a function's source text; ``""`` where it has none.

    What it calls is not looked at. The ``__version__`` of its module, where it has one, counts too: it can say that
    something else has changed.
    """
    code = function if inspect.isroutine(function) else type(function)
    try:
        text = inspect.getsource(code)
    except (OSError, TypeError):
        return ""
    version = getattr(sys.modules.get(getattr(code, "__module__", None) or ""), "__version__", None)
    if version is not None:
        text += f"\n__version__ = {version}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
