"""One arm carried out again, and whether it comes out where a result says it did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrhf.common.environment import commit
from rrhf.common.errors import UserError
from rrhf.common.files import json_lines, read_object
from rrhf.common.presentation import number
from rrhf.evaluation.metrics import mean_interval
from rrhf.recipes.reproduce.arms import arm_named
from rrhf.recipes.reproduce.comparable import difference_of, require_settings
from rrhf.recipes.reproduce.item import plan
from rrhf.recipes.reproduce.place import Item, Place
from rrhf.recipes.reproduce.run import carry
from rrhf.recipes.reproduce.scale import Scale, read_scale
from rrhf.recipes.reproduce.work import prepare
from rrhf.records.files import require_file


def scale_of(result: Mapping[str, Any]) -> Scale:
    """The scale that a result was made at."""
    return read_scale(result["task"], result["scale"], result["asked"])


def read_result(place: str) -> dict[str, Any]:
    """A result as an arm has written it: a file of ``results/``, or ``FILE.jsonl:LINE`` (the first line is 1).

    Raises:
        UserError: there is none.
    """
    file, _, number = place.rpartition(":")
    of_a_line = file.endswith(".jsonl") and number.isdecimal()
    require_file(Path(file if of_a_line else place))
    if of_a_line:
        lines = json_lines(file)
        if not 1 <= int(number) <= len(lines):
            raise UserError(f"{place}: there is no such line: the file has {len(lines)}")
        result = lines[int(number) - 1]
    else:
        result = read_object(Path(place))
    if missing := [
        name for name in ("task", "scale", "arm", "seed", "learning_rate", "asked", "proxy") if name not in result
    ]:
        raise UserError(
            f"{place}: no result of an arm: it lacks {', '.join(missing)}; give a file of results/, or FILE.jsonl:LINE"
        )
    return result


def run_again(place: Place, before: Mapping[str, Any]) -> tuple[bool, str]:
    """Carry the arm of a result out again in ``place``.

    Returns:
        Whether each reward's mean gain lies within the 95 % interval that the result has, and a sentence about it.

    Raises:
        UserError: ``place`` holds that arm, seed and rate of other settings, or of other code.
    """
    scale = prepare(place, scale_of(before))
    item = Item(arm_named(before["task"], before["arm"]), before["seed"], before["learning_rate"])
    if place.is_done(item):
        now = read_object(place.result(item))
        require_settings(now, scale.noted(item.arm, item.seed, item.rate), place.folder)
        if now["commit"] != (here := commit()):
            raise UserError(
                f"{place.folder}: holds what the code of {now['commit']} came to, and this is {here}: choose another "
                "--output to run it again"
            )
    else:
        now = carry(plan(place, scale, item))
    place.write_result(item, now)
    return compared(before, now)


def compared(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the gains of ``now`` lie within the intervals of ``before``, and a sentence about them.

    ρ itself gains nothing, whatever became of it: of it the rewards are compared. The sentence names what else differs:
    with another ρ or reward nothing has been run again.
    """
    parts, within = [], True
    what = "reward" if before["arm"] == "start" else "gain"
    for reward in ("proxy", "gold"):
        if reward not in before:
            continue
        interval, mean = before[reward]["gain"], now[reward]["gain"]["mean"]
        if what == "reward":
            interval, mean = mean_interval(before["prompts"][reward], before["seed"]) or interval, now[reward]["mean"]
        inside = interval["low"] <= mean <= interval["high"]
        within &= inside
        parts.append(
            f"{reward} {number(mean, sign=True)} is {'within' if inside else 'outside'} "
            f"[{number(interval['low'])}, {number(interval['high'])}]"
        )
    where = f"{before['arm']}, seed {before['seed']}"
    if difference := difference_of(before, now):
        parts.append(f"but the two differ in {difference}")
    return within, f"{where}: {'reproduced' if within else 'not reproduced'}: {what}, " + "; ".join(parts)
