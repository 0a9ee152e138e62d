"""Whether results may stand in one table: all begin with the same ρ, and the same rewards judge them.

A model that was trained anew under its old name, as a reward model is on another machine, is another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.presentation import number
from rrhf.recipes.reproduce.scale import REWARDS

Result = Mapping[str, Any]
DIGESTS = {"model": "the weights of ρ", "reward_digests": "a reward model's weights"}  # of results, and of what
APART = 4.0  # standard errors: as far as ρ's mean may lie from itself where its texts were drawn by other arithmetic


def require_comparable(results: Sequence[Result], where: object) -> None:
    """Refuse results that differ in ρ or a reward model, or, of one seed, in what the rewards say of ρ's texts.

    Args:
        results: of one task at one scale. What older ones did not note is not compared, but for a reward model: of
            one that only some of them name nobody knows whether it judged the others.
        where: the file or folder they stand in, for the message.

    Raises:
        UserError: which two, and in what.
    """
    first: dict[object, Result] = {}
    for result in results:
        for what in ("any", *(key for key in DIGESTS if result.get(key)), int(result["seed"])):
            other = first.setdefault(what, result)
            if difference := difference_of(other, result):
                raise UserError(
                    f"{where}: results that cannot be compared: {_name(other)} and {_name(result)} differ in "
                    f"{difference}. A model that was trained anew is another one: keep its results in a folder and a "
                    "file of their own (--output, --export), and --take only what was made with it"
                )


def difference_of(one: Result, other: Result) -> str | None:
    """What two results differ in that should be the same; None where that is nothing."""
    for key, meaning in DIGESTS.items():
        noted = [result.get(key) for result in (one, other)]
        if all(noted) and noted[0] != noted[1]:
            return f"{meaning} ({noted[0]} and {noted[1]})"
    judges = [any(result.get("reward_digests") or []) for result in (one, other)]
    if judges[0] != judges[1]:
        return "a reward model, whose weights only one of the two names"
    for reward in REWARDS if one["seed"] == other["seed"] else ():
        means = [result.get(reward, {}).get("start") for result in (one, other)]
        deviation = one.get(reward, {}).get("start_std")
        if deviation is None or None in means:
            continue
        texts = one["n"] * one.get("held_out_samples", 1)
        if abs(means[0] - means[1]) > APART * deviation / math.sqrt(texts):
            return f"the mean {reward} reward of ρ's texts ({number(means[0])} and {number(means[1])})"
    return None


def _name(result: Result) -> str:
    rate = result.get("learning_rate")
    return f"{result['arm']} (seed {result['seed']}{'' if rate is None else f', rate {rate:g}'})"
