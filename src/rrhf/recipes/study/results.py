"""The lines of results that a study rests on: read, chosen, paired; and how they are kept without this machine's paths.

A line is a result of `rrhf reproduce` (``recipes/reproduce/result.py``): an arm from a seed at a learning rate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rrhf.common.errors import UserError
from rrhf.common.files import cache_folder, json_lines, write_text
from rrhf.common.locks import one_writer
from rrhf.common.presentation import NONE
from rrhf.recipes.reproduce.arms import Arm, arm_named
from rrhf.recipes.reproduce.comparable import require_comparable, require_settings
from rrhf.recipes.reproduce.place import Item, Place
from rrhf.recipes.reproduce.scale import REWARDS, SET_ASIDE, Scale
from rrhf.recipes.reproduce.work import Results, by_key, chosen_rate, rate_rewards
from rrhf.recipes.study.statistics import Estimate, bootstrap

Line = Mapping[str, Any]
KEYS = ("task", "scale", "arm", "seed", "learning_rate", "rate_reward", "proxy", "config")  # that every result has


@dataclass(frozen=True)
class Study:
    """All results of one task at one scale.

    Attributes:
        lines: the results.
        file: where they stand, for the page.
    """

    lines: Sequence[Line]
    file: Path

    @cached_property
    def task(self) -> str:
        return str(self.lines[0]["task"])

    @cached_property
    def scale(self) -> str:
        return str(self.lines[0]["scale"])

    @cached_property
    def names(self) -> list[str]:
        """Arms in the order in which their first results stand."""
        return list(dict.fromkeys(str(line["arm"]) for line in self.lines))

    @cached_property
    def first(self) -> dict[str, int]:
        """Each arm's first seed, from which it was run at all its rates."""
        found: dict[str, int] = {}
        for line in self.lines:
            found[line["arm"]] = min(found.get(line["arm"], int(line["seed"])), int(line["seed"]))
        return found

    @cached_property
    def set_aside(self) -> bool:
        """Whether seeds and prompts are those that are set aside to confirm what a search has found."""
        return min(self.first.values()) >= SET_ASIDE

    @cached_property
    def known_rewards(self) -> list[str]:
        """The rewards that all results have; HH has no gold one."""
        each = [line["prompts"] for line in self.lines if "prompts" in line]
        return [reward for reward in REWARDS if all(reward in prompts for prompts in each)]

    @property
    def judge(self) -> str:
        """The reward that arms are held against each other by: gold where there is one."""
        return self.known_rewards[-1]

    def arm(self, name: str) -> Arm:
        return arm_named(self.task, name)

    def rates(self, name: str) -> list[float]:
        """The learning rates that the arm's first seed was run at, and whose results are here."""
        first = self.first.get(name)
        of_first = {line["learning_rate"] for line in self.lines if (line["arm"], line["seed"]) == (name, first)}
        return sorted(rate for rate in of_first if rate is not None)

    def seeds(self, name: str) -> dict[int, Line]:
        """The arm's results at its chosen rate, by seed; none where it was not run."""
        if name not in self.names:
            return {}
        return self.at_rate(name, self.chosen(name))

    def chosen(self, name: str) -> float | None:
        """The arm's learning rate: the best of those it was run at, or None where it has none."""
        return chosen_rate(self.arm(name), self.rates(name) or [0.0], self.results, [self.first[name]])[1]

    def shown_rate(self, name: str) -> str:
        """The arm's learning rate, whether it is at an edge of its grid (↑ or ↓), and how many seeds chose it."""
        rates, rate = self.rates(name), self.chosen(name)
        if rate is None:
            return NONE
        if len(rates) < 2:
            return f"{rate:g}"
        edge = {rates[0]: "↓", rates[-1]: "↑"}.get(rate, "")
        return f"{rate:g}{edge} ({len(rate_rewards(name, rates, self.results))})"

    @cached_property
    def results(self) -> Results:
        """The results by arm, seed and rate."""
        return by_key(self.lines)

    def at_rate(self, name: str, rate: float | None) -> dict[int, Line]:
        """The arm's results at a rate, by seed."""
        # Some that were not the best when they were exported have no prompts' rewards: they would have to be run again.
        found = {
            int(line["seed"]): line
            for line in self.lines
            if line["arm"] == name and line["learning_rate"] == rate and "prompts" in line
        }
        return dict(sorted(found.items()))

    def rewards(self, name: str, reward: str, seeds: Sequence[int] | None = None) -> np.ndarray:
        """The rewards of π's texts [seeds, prompts]; NaN where one has no score."""
        lines = self.seeds(name)
        chosen = list(lines) if seeds is None else seeds
        return np.array([lines[seed]["prompts"][reward] for seed in chosen], dtype=float)

    def phrase(self, name: str) -> str:
        """How much more of π's texts have its seed's phrase than of ρ's, and the first seed's; – where none counted."""
        counted = [line["phrases"] for line in self.seeds(name).values() if "phrases" in line]
        if not counted:
            return NONE
        rises = [found[0]["pi"] - found[0]["rho"] if found else 0.0 for found in counted]
        said = [found[0]["phrase"] for found in counted if found]
        return f"{np.mean(rises):.2f}" + (f" “{said[0]}”" if said else "")

    def common(self, *names: str) -> list[int]:
        """The seeds that all these arms were run from."""
        each = [set(self.seeds(name)) for name in names]
        return sorted(set.intersection(*each)) if each else []

    def common_of_any_rate(self, *names: str) -> list[int]:
        """The seeds from which all these arms were run, at whatever rate."""
        each = [{int(line["seed"]) for line in self.lines if line["arm"] == name} for name in names]
        return sorted(set.intersection(*each))

    def difference(
        self, name: str, other: str, reward: str, allowed: float = 0.0, rate: float | None = None
    ) -> Estimate | None:
        """An arm's reward, and what it is ``allowed`` to lack, less another's, paired by seed and prompt.

        Both at their chosen rates, or at ``rate``. None where they share no seed, or the results lack that reward.
        """
        runs = [self.seeds(each) if rate is None else self.at_rate(each, rate) for each in (name, other)]
        seeds = sorted(runs[0].keys() & runs[1].keys())
        if not seeds or reward not in self.known_rewards:
            return None
        ours, theirs = (np.array([of[seed]["prompts"][reward] for seed in seeds], dtype=float) for of in runs)
        return bootstrap(ours + allowed - theirs)

    def gain(self, name: str, reward: str) -> Estimate | None:
        """An arm's reward less that of ρ, which is the arm ``start``."""
        return self.difference(name, "start", reward)

    def numbers(self, name: str, *path: str) -> np.ndarray:
        """One number a seed, found by keys; seeds without it are left out."""
        found = []
        for line in self.seeds(name).values():
            value: Any = line
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                found.append(float(value))
        return np.array(found)

    def over_seeds(self, values: Iterable[float]) -> Estimate | None:
        """The mean of one number a seed with its interval over seeds; None where there is none."""
        column = np.array(list(values), dtype=float)[:, None]
        return bootstrap(column) if column.size else None


def making(line: Line) -> float:
    """Seconds to sample, score and train; what measures the result is not in them."""
    return sum(float(line["seconds"].get(stage, 0.0)) for stage in ("sample", "score", "train"))


def read_study(file: Path) -> Study:
    """The results in a file of lines.

    Raises:
        UserError: the file cannot be read, holds no result, results of several tasks or scales, or such as cannot be
            compared.
    """
    lines = _lines_of(file)
    _require_one_table(lines, file)
    return Study(lines, file)


def _lines_of(file: Path) -> list[Line]:
    """The results in a file of lines.

    Raises:
        UserError: the file cannot be read, or a line is no result.
    """
    try:
        lines = json_lines(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no file of results: {error}") from error
    for number, line in enumerate(lines, 1):
        lacking = [key for key in KEYS if not isinstance(line, Mapping) or key not in line]
        if lacking:
            raise UserError(
                f"{file}, line {number}: no result, as `rrhf reproduce --export` writes them: it lacks "
                + ", ".join(lacking)
            )
    return lines


def _require_one_table(lines: Sequence[Line], file: Path) -> None:
    """Refuse results that are not of one table.

    Raises:
        UserError: there is none, or they are of several tasks or scales, or such as cannot be compared.
    """
    if len({(line["task"], line["scale"]) for line in lines}) != 1:
        raise UserError(f"{file}: needs results of one task at one scale, as `rrhf reproduce --export` writes them")
    if len({int(line["seed"]) >= SET_ASIDE for line in lines}) > 1:
        raise UserError(f"{file}: has results of prompts set aside and others: they belong into two files")
    require_comparable(lines, file)


def export(results: Sequence[Line], folder: Path, file: Path) -> int:
    """Add results to a file of lines, those with the same arm, seed and rate replaced; paths become relative.

    Of learning rates that were not chosen the history is left out, but where the policy was watched.

    Returns:
        How many lines the file has now.

    Raises:
        UserError: the file is none of results, or those of the file and of the folder are not of one table; the file
            stays as it is.
    """
    places = {str(folder.absolute()): ".", str(cache_folder()): "cache"}
    added = [_portable(result, places, str(folder)) for result in results]
    with one_writer(file.absolute().parent):  # two that add to a file at once would lose the lines of one
        before = _lines_of(file) if file.exists() else []
        _require_one_table([*before, *added], file)  # those that are replaced too: what replaces them is the same arm
        lines = _merged({**by_key(before), **by_key(added)}, file)
        write_text(file, "\n".join(lines) + "\n")
    return len(lines)


def _merged(kept: Mapping[Any, Line], file: Path) -> list[str]:
    """The lines of a file of results, in the order of arms, seeds and rates, without the histories nobody reads."""
    study = Study(list(kept.values()), file)
    chosen = {(name, seed, line["learning_rate"]) for name in study.names for seed, line in study.seeds(name).items()}
    lines = []
    for key, line in sorted(
        kept.items(), key=lambda pair: (study.names.index(pair[0][0]), pair[0][1], pair[0][2] or 0)
    ):
        kept_line = dict(line)
        was_watched = any("eval_reward_mean" in entry for entry in line.get("history") or [])
        if key not in chosen and study.seeds(key[0]) and not was_watched:
            kept_line.pop("history", None)
        lines.append(json.dumps(kept_line, ensure_ascii=False))
    return lines


def take(file: Path, place: Place, scale: Scale) -> int:
    """Put the results in a file of lines into a folder, where its command then goes on from them.

    Returns:
        How many they are.

    Raises:
        UserError: they are of another task or scale, of other settings, or of prompts set aside where this scale's are
            not, or cannot be compared with those that are there.
    """
    study = read_study(file)
    if (study.task, study.scale) != (scale.task, scale.name):
        raise UserError(
            f"{file}: results of {study.task} at the scale {study.scale}, not of {scale.task} at {scale.name}"
        )
    if study.set_aside != scale.set_aside:
        raise UserError(
            f"{file}: results of prompts {'' if study.set_aside else 'not '}set aside: give "
            f"reproduce.set_aside={str(study.set_aside).lower()}"
        )
    items = [Item(study.arm(line["arm"]), line["seed"], line["learning_rate"]) for line in study.lines]
    for item, line in zip(items, study.lines):
        require_settings(line, scale.noted(item.arm, item.seed, item.rate), file)
    require_comparable([*place.results(), *study.lines], place.folder)
    for item, line in zip(items, study.lines):
        if not place.is_done(item):
            place.write_result(item, line)
    return len(study.lines)


def _portable(result: Line, places: Mapping[str, str], folder: str) -> Line:
    """A result without absolute paths; the folder where it was made, by its prompts, may have been another one."""
    source = Path(str(result["config"].get("data", {}).get("source", "")))
    made_in = {str(source.parent.parent): "."} if source.is_absolute() and source.parent.name == "prompts" else {}
    portable: Line = _without_places(result, {**made_in, **places}, folder)
    return portable


def _without_places(value: Any, places: Mapping[str, str], folder: str) -> Any:
    """A result without the places where it was made: absolute ``places``, and what lies in the ``folder`` given."""
    if isinstance(value, Mapping):
        return {key: _without_places(each, places, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each, places, folder) for each in value]
    if isinstance(value, str):
        for place, name in places.items():
            value = re.sub(rf"{re.escape(place)}(?=/|$|[^\w.-])", name, value)  # not …/out of …/output
        if value.startswith(f"{folder}/"):  # a short name may stand in other words too
            value = f".{value[len(folder) :]}"
    return value
