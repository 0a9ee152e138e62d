"""One arm carried out again, and whether it comes out where a result says it did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.files import read_object
from rrhf.common.presentation import number
from rrhf.recipes.reproduce.arms import arm_named
from rrhf.recipes.reproduce.place import Item, Place
from rrhf.recipes.reproduce.run import carry, plan
from rrhf.recipes.reproduce.scale import Scale, read_scale
from rrhf.recipes.reproduce.work import prepare


def scale_of(result: Mapping[str, Any]) -> Scale:
    """The scale that a result was made at."""
    return read_scale(result["task"], result["scale"], result["asked"])


def read_result(file: Path) -> dict[str, Any]:
    """A result as an arm has written it.

    Raises:
        UserError: the file is none.
    """
    result = read_object(file)
    if missing := [name for name in ("task", "scale", "arm", "seed", "asked", "proxy") if name not in result]:
        raise UserError(f"{file}: no result of an arm: it lacks {', '.join(missing)}; give a file of results/")
    return result


def run_again(place: Place, before: Mapping[str, Any]) -> tuple[bool, str]:
    """Carry the arm of a result out again in ``place``.

    Returns:
        Whether each reward's mean gain lies within the 95 % interval that the result has, and a sentence about it.
    """
    scale = prepare(place, scale_of(before))
    item = Item(arm_named(before["task"], before["arm"]), before["seed"], before["learning_rate"])
    now = read_object(place.result(item)) if place.is_done(item) else carry(plan(place, scale, item))
    place.write_result(item, now)
    return compared(before, now)


def compared(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the gains of ``now`` lie within the intervals of ``before``, and a sentence about them."""
    parts, within = [], True
    for reward in ("proxy", "gold"):
        if reward not in before:
            continue
        interval, mean = before[reward]["gain"], now[reward]["gain"]["mean"]
        inside = interval["low"] <= mean <= interval["high"]
        within &= inside
        parts.append(
            f"{reward} {number(mean, sign=True)} is {'within' if inside else 'outside'} "
            f"[{number(interval['low'])}, {number(interval['high'])}]"
        )
    where = f"{before['arm']}, seed {before['seed']}"
    return within, f"{where}: {'reproduced' if within else 'not reproduced'}: gain, " + "; ".join(parts)
