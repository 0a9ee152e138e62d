"""Rewards that are Python functions of the user's, with TRL's signature."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import numbers
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from rrhf.common.errors import FailedError, UserError
from rrhf.common.imports import last_line, load_function
from rrhf.records.record import Record
from rrhf.rewards.kind import Item, Scorer

RewardFunction = Callable[..., Any]  # f(prompts, completions, **columns) -> list[float | None], plain or async

USAGE = "a function f(prompts, completions, **columns)"


def load_reward(name: str) -> RewardFunction:
    """Import the reward function ``pkg.module:function``. Raises ``UserError`` where there is none."""
    return load_function(name, "reward", USAGE)


def function_scorer(
    function: RewardFunction, name: str, in_the_data: Callable[[], Collection[str]] = frozenset
) -> Scorer:
    """Return the scorer that calls ``function`` once for all the responses it is given.

    What the function gets is what TRL gives it: ``prompts`` and ``completions``, one a response, as text where the
    query is text and as lists of messages where it is one; and of the records' unknown columns, each value repeated
    for its responses, those the function names, or all where it takes ``**kwargs``. None stands where a record
    lacks a column.

    Args:
        function: the reward.
        name: what messages call it.
        in_the_data: the unknown columns that any record of the data has; asked where those of one call lack one that
            the function names.

    Raises (the scorer):
        UserError: the function fails, or gives something else than one finite number or None a response.
    """
    wanted, takes_all = _parameters(function)

    def columns(items: Sequence[Item]) -> dict[str, list[Any]]:
        names = dict.fromkeys(column for record, _ in items for column in record.extra)
        given = {
            column: [record.extra.get(column) for record, _ in items]
            for column in names
            if (takes_all or column in wanted) and column not in ("prompts", "completions")
        }
        for column in wanted:
            if column not in given and column in in_the_data():
                given[column] = [None] * len(items)
        missing = [column for column, required in wanted.items() if required and column not in given]
        if missing:
            raise UserError(
                f"reward {name!r} asks for the column {missing[0]!r}, which the records lack "
                f"(unknown columns there: {', '.join(names) or 'none'}): add it, or give the parameter a default"
            )
        return given

    def call(items: Sequence[Item]) -> list[float | None]:
        prompts = [record.query for record, _ in items]
        completions = [_completion(record, index) for record, index in items]
        given = columns(items)
        try:
            values = _wait(function(prompts=prompts, completions=completions, **given))
        except UserError:
            raise
        except Exception as error:
            raise _RewardFailedError(f"reward {name!r} failed on {_ids(items)}: {last_line(error)}") from error
        return _checked(values, items, name)

    def scores(items: Sequence[Item]) -> list[float | None]:
        if not items:
            return []
        try:
            return call(items)
        except _RewardFailedError as error:
            _narrow(call, items, error)

    return scores


class _RewardFailedError(FailedError):
    """A function failed on its responses as a whole, so that it is not known which record is at fault."""


def _narrow(call: Scorer, items: Sequence[Item], error: _RewardFailedError) -> NoReturn:
    """Raise the error of the one record at fault, found by halves; the error given where each half does well alone."""
    records = list(dict.fromkeys(id(record) for record, _ in items))
    half = set(records[: len(records) // 2])
    if half:
        for part in ([item for item in items if (id(item[0]) in half) is first] for first in (True, False)):
            try:
                call(part)
            except _RewardFailedError as narrower:
                _narrow(call, part, narrower)
    raise error


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
    """Await the values of an async function; also where an event loop runs already, as in a notebook."""
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
        raise _RewardFailedError(
            f"reward {name!r} returned {type(values).__name__} for {_ids(items)}: it must return a list"
        )
    if len(values) != len(items):
        raise _RewardFailedError(
            f"reward {name!r} returned {len(values)} scores for the {len(items)} responses of {_ids(items)}: "
            "it must return one a completion"
        )
    return [_score(value, record, index, name) for value, (record, index) in zip(values, items)]


def _score(value: Any, record: Record, index: int, name: str) -> float | None:
    if value is None or (type(value) is float and math.isfinite(value)):  # nearly all are
        return value
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
