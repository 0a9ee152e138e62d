"""Results of other commands that a page shows beside runs: what `rrhf judge`, `rrhf arena results`, `rrhf evaluate
--pairs` and `rrhf reward-model` write. Each is known by what it holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.presentation import clean, finite

COMMANDS = "`rrhf judge`, `rrhf arena results`, `rrhf evaluate --pairs` or `rrhf reward-model`"


@dataclass(frozen=True)
class Results:
    """By kind, (name of the file, content)."""

    judged: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    arena: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    accuracy: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


def read_results(paths: Sequence[str | Path]) -> Results:
    """Read result files.

    Raises:
        UserError: a file cannot be read, or holds none of these results.
    """
    found = Results()
    for path in map(Path, paths):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        kind = _kind(value, found)
        if kind is None:
            raise UserError(f"{path}: holds no results that a report shows; give a JSON file that {COMMANDS} wrote")
        kind.append((clean(path.name), value))
    return found


def _kind(value: Any, found: Results) -> list[tuple[str, dict[str, Any]]] | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("judges"), dict) and "questions" in value:
        return found.judged
    if isinstance(value.get("comparisons"), list | dict) and "raters" in value:
        return found.arena
    held_out = value.get("held_out")
    if isinstance(value.get("accuracy"), dict) or (isinstance(held_out, dict) and _accuracy_of(held_out)):
        return found.accuracy
    return None


def interval(value: Any, scale: float = 1.0) -> dict[str, float] | None:
    """A number, or one with its interval (``mean``, ``low``, ``high``), as the latter; None for neither."""
    if isinstance(value, Mapping):
        mean, low, high = (finite(value.get(name)) for name in ("mean", "low", "high"))
    else:
        mean, low, high = finite(value), None, None
    if mean is None:
        return None
    ends = {} if low is None or high is None else {"low": scale * low, "high": scale * high}
    return {"mean": scale * mean, **ends}


@dataclass(frozen=True)
class Accuracy:
    """How often ``judge`` ranks as ``preferences`` say, in per cent of ``n`` records, with intervals."""

    source: str
    preferences: str
    judge: str
    n: int | None
    ties: int | None
    pairs: dict[str, float] | None
    best: dict[str, float] | None


def accuracies(
    block: Mapping[str, Any], source: str, preferences: str, without: Sequence[str] = ("gain",)
) -> list[Accuracy]:
    """The judges of what ``evaluate_pairs`` gives but for ``without``, each with its subsets behind it."""
    names = {"rho": "ρ before", "pi": "π after", "pi - rho": "π − ρ (DPO’s implicit reward)"}
    rows = []
    for judge, numbers in block.items():
        if not isinstance(numbers, Mapping) or judge in without:
            continue
        subsets = numbers.get("subsets") or {}
        for subset, values in {"": numbers, **subsets}.items():
            name = clean(names.get(judge, judge)) + (f" · {clean(subset)}" if subset else "")
            counts = (int(n) if (n := finite(values.get(key))) is not None else None for key in ("n", "ties"))
            shares = (interval(values.get(key), 100) for key in ("accuracy", "best"))
            rows.append(Accuracy(source, preferences, name, *counts, *shares))  # type: ignore[arg-type]
    return rows


def accuracies_of_file(name: str, value: Mapping[str, Any]) -> list[Accuracy]:
    """The rows of a file of ``rrhf evaluate --pairs`` or ``rrhf reward-model``."""
    if isinstance(value.get("accuracy"), Mapping):
        block = value["accuracy"]
        return accuracies(block, name, clean(Path(str(block.get("file", "pairs"))).name))
    held_out = value["held_out"]
    queries = finite(held_out.get("queries"))
    return [
        Accuracy(
            name, "held-out queries", "reward model", None if queries is None else int(queries), None,
            interval(_accuracy_of(held_out), 100), None,
        )
    ]  # fmt: skip


def _accuracy_of(held_out: Mapping[str, Any]) -> Any:
    return held_out.get("accuracy") or held_out.get("pair_accuracy")
