"""Rewards that are Python functions of the user's, with TRL's signature."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import importlib
import inspect
import math
import numbers
import os
import pkgutil
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from rrhf.errors import UserError, nearest
from rrhf.records import Record

RewardFunction = Callable[..., Any]  # f(prompts, completions, **columns) -> list[float | None], plain or async
Item = tuple[Record, int]  # one response: its record and its index in it
Scorer = Callable[[Sequence[Item]], list[float | None]]  # a score a response


def load_reward(name: str) -> RewardFunction:
    """Import the reward function ``pkg.module:function``; modules of the current folder are found too.

    A callable object and an async function are as good as a function, and ``module:object.method`` is followed.

    Raises:
        UserError: no such module or attribute, the module cannot be imported, or what was found cannot be called.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise UserError(f"reward {name!r}: write it as pkg.module:function")
    found: Any = _import(module_name, name)
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            own = (key for key, value in vars(found).items() if callable(value)) if hasattr(found, "__dict__") else ()
            known = [key for key in own if not key.startswith("_")]
            raise UserError(f"reward {name!r}: {module_name} has no {attribute!r}: {nearest(attribute, known)}")
        found = getattr(found, attribute)
    if inspect.isclass(found) or not callable(found):
        raise UserError(
            f"reward {name!r} is {'a class' if inspect.isclass(found) else type(found).__name__}, not a function: "
            "name a function f(prompts, completions, **columns), or an object that can be called so"
        )
    return found


def _import(module_name: str, reward: str) -> Any:
    if os.getcwd() not in sys.path:  # noqa: PTH109 — sys.path holds text
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(f"reward {reward!r}: {module_name} needs the module {error.name!r}: install it") from error
        raise UserError(
            f"reward {reward!r}: no module {error.name!r} here or among the installed ones"
            f"{_similar_module(error.name)}; run from the folder that has it, or install it"
        ) from error
    except Exception as error:
        raise UserError(f"reward {reward!r}: importing {module_name} failed: {_last_line(error)}") from error


def _similar_module(name: str) -> str:
    parent, _, last = name.rpartition(".")
    folders = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    known = [module.name for module in pkgutil.iter_modules(folders)]
    close = difflib.get_close_matches(last, known, n=1, cutoff=0.6)
    return f" (did you mean {parent + '.' if parent else ''}{close[0]}?)" if close else ""


def function_scorer(function: RewardFunction, name: str) -> Scorer:
    """Return the scorer that calls ``function`` once for all the responses it is given.

    What the function gets is what TRL gives it: ``prompts`` and ``completions``, one a response, as text where the
    query is text and as lists of messages where it is one; and of the records' unknown columns, each value repeated
    for its responses, those the function names, or all where it takes ``**kwargs``. None stands where a record
    lacks a column.

    Raises (the scorer):
        UserError: the function fails, or gives something else than one finite number or None a response.
    """
    wanted, takes_all = _parameters(function)

    def scores(items: Sequence[Item]) -> list[float | None]:
        if not items:
            return []
        names = dict.fromkeys(column for record, _ in items for column in record.extra)
        columns = {
            column: [record.extra.get(column) for record, _ in items]
            for column in names
            if (takes_all or column in wanted) and column not in ("prompts", "completions")
        }
        missing = [column for column, required in wanted.items() if required and column not in columns]
        if missing:
            raise UserError(
                f"reward {name!r} asks for the column {missing[0]!r}, which the records lack "
                f"(unknown columns there: {', '.join(names) or 'none'}): add it, or give the parameter a default"
            )
        prompts = [record.query for record, _ in items]
        completions = [_completion(record, index) for record, index in items]
        try:
            values = _wait(function(prompts=prompts, completions=completions, **columns))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"reward {name!r} failed on {_ids(items)}: {_last_line(error)}") from error
        return _checked(values, items, name)

    return scores


def _parameters(function: RewardFunction) -> tuple[dict[str, bool], bool]:
    """The columns a function names, with whether it needs them, and whether it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-ins have no signature
        return {}, False
    named = {
        p.name: p.default is p.empty
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in ("prompts", "completions")
    }
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _completion(record: Record, index: int) -> Any:
    response = record.responses[index]
    return response if isinstance(record.query, str) else [{"role": "assistant", "content": response}]


def _wait(values: Any) -> Any:
    """Return what an async function promises; also where an event loop runs already, as in a notebook."""
    if not inspect.isawaitable(values):
        return values

    async def wait() -> Any:
        return await values

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["values"] = asyncio.run(wait())
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["values"]


def _checked(values: Any, items: Sequence[Item], name: str) -> list[float | None]:
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise UserError(f"reward {name!r} returned {type(values).__name__} for {_ids(items)}: it must return a list")
    if len(values) != len(items):
        raise UserError(
            f"reward {name!r} returned {len(values)} scores for the {len(items)} responses of {_ids(items)}: "
            "it must return one a completion"
        )
    return [_score(value, record, index, name) for value, (record, index) in zip(values, items)]


def _score(value: Any, record: Record, index: int, name: str) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item"):  # numpy's and torch's scalars; what holds more numbers than one is reported below
        with contextlib.suppress(RuntimeError, ValueError):
            value = value.item()
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UserError(
            f"reward {name!r} gave {value!r} for response {index} of record {record.id!r}: "
            "a score is a finite number, or None for a response it cannot score"
        )
    return float(value)


def _ids(items: Sequence[Item], shown: int = 8) -> str:
    ids = list(dict.fromkeys(record.id for record, _ in items))
    more = f" … ({len(ids)} records)" if len(ids) > shown else ""
    return f"record{'s' if len(ids) > 1 else ''} {', '.join(ids[:shown])}{more}"


def _last_line(error: BaseException) -> str:
    """What failed and where: the error with the innermost line of code, outside the libraries if there is one."""
    what = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "<frozen" not in frame.filename]
    for frame in reversed(own or frames):
        return f"{what} (in {frame.name}, {frame.filename}, line {frame.lineno})"
    return what
