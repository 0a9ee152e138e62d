"""Arms × seeds as a list of work that any number of processes share: each takes the next that nobody has.

The first seeds, as many as the scale says, run every rate of the grid; the others run the rate that came out best for
the arm, or, where that is asked for, every rate too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rrhf.common.errors import UserError
from rrhf.recipes.reproduce.arms import Arm
from rrhf.recipes.reproduce.comparable import require_comparable, require_settings
from rrhf.recipes.reproduce.data import with_model, write_prompts
from rrhf.recipes.reproduce.item import plan
from rrhf.recipes.reproduce.place import Item, Place
from rrhf.recipes.reproduce.run import carry
from rrhf.recipes.reproduce.scale import Scale

log = logging.getLogger("rrhf")

WAIT = 1.0  # seconds between two looks at what other processes have done

Results = Mapping[tuple[str, int, float | None], Mapping[str, Any]]  # (arm, seed, rate) → its result


@dataclass(frozen=True)
class Table:
    """What is to be done: arms × seeds, and the grid of rates.

    Attributes:
        first: the first seed.
        rate_seeds: how many seeds from the first on run every rate, and choose among them.
        every_rate: whether every seed runs every rate, as comparisons at equal KL need.
    """

    arms: Sequence[Arm]
    seeds: int
    rates: Sequence[float]
    first: int = 0
    every_rate: bool = False
    rate_seeds: int = 1

    @property
    def range(self) -> range:
        return range(self.first, self.first + self.seeds)

    def items(self, results: Results) -> Iterator[Item]:
        """What can be begun, in order; an arm's later seeds wait until its rate is chosen."""
        for seed in self.range:
            for arm in self.arms:
                for rate in self._rates(arm, seed, results):
                    yield Item(arm, seed, rate)

    @property
    def choosing(self) -> Sequence[int]:
        """The seeds that have to run every rate before one is chosen."""
        return self.range[: max(1, self.rate_seeds)]

    def chosen(self, arm: Arm, results: Results) -> tuple[bool, float | None]:
        """Whether an arm's rate is known yet, and which."""
        return chosen_rate(arm, self.rates, results, self.choosing)

    def _rates(self, arm: Arm, seed: int, results: Results) -> Sequence[float | None]:
        if arm.has_rate and (seed in self.choosing or self.every_rate):
            return self.rates
        known, rate = self.chosen(arm, results)
        return (rate,) if known else ()

    def is_complete(self, results: Results) -> bool:
        """Whether every arm has its rate and every seed at it."""
        for arm in self.arms:
            known, rate = self.chosen(arm, results)
            if not known or any((arm.name, seed, rate) not in results for seed in self.range):
                return False
        return not self.every_rate or all((i.arm.name, i.seed, i.rate) in results for i in self.items(results))


def chosen_rate(
    arm: Arm, rates: Sequence[float], results: Results, needed: Sequence[int] = (0,)
) -> tuple[bool, float | None]:
    """Whether an arm's rate is known yet, and which: the best by the reward that trains, on prompts kept for that.

    The best is that of the mean over all seeds that were run at every rate, among which the ``needed`` ones must be; of
    equal ones the lowest. One seed alone chooses badly where trainings differ much by seed, as PPO's do. Everybody who
    reads the same results finds the same, so the choice needs no file.
    """
    if not arm.has_rate:
        return True, None
    if len(rates) == 1:
        return True, rates[0]
    rewards = rate_rewards(arm.name, rates, results)
    if not set(needed) <= set(rewards):
        return False, None
    means = {rate: sum(each[rate] for each in rewards.values()) / len(rewards) for rate in rates}
    return True, max(sorted(means), key=lambda rate: means[rate])


def rate_rewards(name: str, rates: Sequence[float], results: Results) -> dict[int, dict[float, float]]:
    """By seed and rate what an arm earned on the prompts kept for choosing; of seeds that were run at every rate."""
    by_seed: dict[int, dict[float, float]] = {}
    for (arm, seed, rate), result in results.items():
        if arm == name and rate is not None and rate in rates and result["rate_reward"] is not None:
            by_seed.setdefault(seed, {})[rate] = float(result["rate_reward"])
    return {seed: found for seed, found in sorted(by_seed.items()) if len(found) == len(rates)}


def by_key(results: Sequence[Mapping[str, Any]]) -> Results:
    return {(result["arm"], result["seed"], result["learning_rate"]): result for result in results}


def prepare(place: Place, scale: Scale) -> Scale:
    """Train the model where it has to be, and write the prompts; one process does it, others wait.

    Returns:
        The scale with its model and its data in place.
    """
    with place.claimed("prepare", wait=True):
        scale = replace(scale, config=with_model(scale))
        return replace(scale, config=write_prompts(scale, place.prompts))


def check(place: Place, scale: Scale, table: Table) -> None:
    """Check the configuration of every arm, and that what has ended in the folder is of the same settings.

    Raises:
        UserError: one has faults; or a result was made with other settings, so that this table would not be of those
            that are asked for.
    """
    arms = {arm.name: arm for arm in table.arms}
    for arm in table.arms:
        plan(place, scale, Item(arm, table.first, table.rates[0] if arm.has_rate else None))
    for result in place.results():
        if result["arm"] in arms:
            asked = scale.noted(arms[result["arm"]], result["seed"], result["learning_rate"])
            require_settings(result, asked, place.folder)


def work_through(place: Place, scale: Scale, table: Table) -> None:
    """Do what no other process has or does, until the table is complete.

    An arm that cannot be carried out does not hold the others up.

    Raises:
        UserError: arms that could not be carried out, each with its reason; or results that cannot be compared.
        Stopped: a signal came; everything that is finished is kept.
    """
    failed: dict[str, str] = {}
    while True:
        results = by_key(place.results())
        waiting = [item for item in table.items(results) if not place.is_done(item) and item.name not in failed]
        if not waiting:
            break
        if not any(_take(place, scale, item, failed) for item in waiting):
            time.sleep(WAIT)  # others have them all
    if failed:
        reasons = "\n  ".join(f"{name}: {why}" for name, why in failed.items())
        raise UserError(f"not carried out:\n  {reasons}\nWhat has ended stands; the same command does these again")


def _take(place: Place, scale: Scale, item: Item, failed: dict[str, str]) -> bool:
    """Carry an item out, unless another process has it; whether this one did."""
    with place.claimed(item.name) as mine:
        if not mine:
            return False
        if not place.is_done(item):
            try:
                result = carry(plan(place, scale, item))
            except UserError as error:
                log.warning(f"{item.name}: {error}")
                failed[item.name] = str(error)
            else:
                require_comparable([*place.results(), result], place.folder)
                place.write_result(item, result)
        return True
