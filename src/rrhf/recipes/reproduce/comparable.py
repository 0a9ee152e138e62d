"""Whether results may stand in one table: all begin with the same ρ, the same rewards judge them on the same prompts.

A model that was trained anew under its old name, as a reward model is on another machine, is another one; and an
arm of other settings, as of more steps, is another arm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.presentation import number
from rrhf.common.settings import differences
from rrhf.recipes.reproduce.scale import REWARDS
from rrhf.recipes.run_folder import binding

Result = Mapping[str, Any]
DIGESTS = {  # of results, and of what
    "model": "the weights of ρ", "reward_digests": "a reward model's weights", "held_out": "the held-out prompts",
}  # fmt: skip
APART = 4.0  # standard errors: as far as ρ's mean may lie from itself where its texts were drawn by other arithmetic

# Of a configuration: what is a result's own, what names a place (digests tell what lies there), what machines need.
OWN = {"seed", "learning_rate", "model", "reference_model", "perplexity_model", "reward", "device", "dtype", "bf16",
       "batch_size"}  # fmt: skip
DEFAULTS = {"train.interpolation": 1}  # that older results noted


def require_comparable(results: Sequence[Result], where: object) -> None:
    """Refuse results that differ in ρ, a reward model or the held-out prompts, or, of one arm, in settings.

    Of one seed, too, where the rewards say something else of ρ's texts.

    Args:
        results: of one task at one scale. What older ones did not note is not compared, but for a reward model: of
            one that only some of them name nobody knows whether it judged the others.
        where: the file or folder they stand in, for the message.

    Raises:
        UserError: which two, and in what.
    """
    first: dict[object, Result] = {}
    for result in results:
        arm = ("arm", result["arm"])
        for what in ("any", *(key for key in DIGESTS if result.get(key)), int(result["seed"]), arm):
            other = first.setdefault(what, result)
            if difference := difference_of(other, result):
                raise UserError(
                    f"{where}: results that cannot be compared: {_name(other)} and {_name(result)} differ in "
                    f"{difference}. A model that was trained anew, or an arm made otherwise, is another one: keep its "
                    "results in a folder and a file of their own (--output, --export), and --take only such"
                )


def require_settings(result: Result, asked: Mapping[str, Any], where: object) -> None:
    """Refuse a result that was made with other settings than are asked for now.

    Args:
        result: of the arm, seed and rate that ``asked`` is of.
        asked: the configuration that it would have now (``Scale.noted``).
        where: the file or folder it stands in, for the message.

    Raises:
        UserError: where they differ.
    """
    if other := _other_settings(result, {"config": asked}):
        raise UserError(
            f"{where}: {_name(result)} was made with other settings ({other}): give those, or choose another --output"
        )


def _other_settings(one: Result, other: Result) -> str | None:
    """Which settings two results of an arm were made with differ, of the sections that both have noted.

    What trains nothing has none of training.
    """
    noted = [result.get("config") or {} for result in (one, other)]
    sections = noted[0].keys() & noted[1].keys() - ({"train"} if one.get("learning_rate") is None else set())
    settings = [_settings({key: config[key] for key in sections}) for config in noted]
    return "; ".join(differences(*settings).values()) or None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make an arm what it is; those at null are as good as not given."""
    return {
        name: value
        for name, value in binding(config).items()
        if name.rpartition(".")[2] not in OWN and not name.startswith("data.") and value != DEFAULTS.get(name)
    }


def difference_of(one: Result, other: Result) -> str | None:
    """What two results differ in that should be the same; None where that is nothing."""
    for key, meaning in DIGESTS.items():
        noted = [result.get(key) for result in (one, other)]
        if all(noted) and noted[0] != noted[1]:
            return f"{meaning} ({noted[0]} and {noted[1]})"
    judges = [any(result.get("reward_digests") or []) for result in (one, other)]
    if judges[0] != judges[1]:
        return "a reward model, whose weights only one of the two names"
    numbers = [result.get("n") for result in (one, other)]
    if None not in numbers and numbers[0] != numbers[1]:
        return f"the number of held-out prompts ({numbers[0]} and {numbers[1]})"
    if one["arm"] == other["arm"] and (settings := _other_settings(one, other)):
        return f"settings ({settings})"
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
