"""Results → the rows of the tables: one an arm, over its seeds at the rate that was chosen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rrhf.common.presentation import NONE, number, quantity
from rrhf.recipes.reproduce.arms import Arm
from rrhf.recipes.reproduce.scale import REWARDS
from rrhf.recipes.reproduce.work import Results, Table, rate_rewards


@dataclass(frozen=True)
class Row:
    """An arm and its results at the chosen rate, one a seed that has ended."""

    arm: Arm
    rate: float | None
    results: Sequence[Mapping[str, Any]]

    def values(self, *path: str) -> list[float]:
        """One number a seed, found by keys; seeds that have none are left out."""
        found = []
        for result in self.results:
            value: Any = result
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                found.append(float(value))
        return found

    def mean(self, *path: str) -> float | None:
        values = self.values(*path)
        return statistics.fmean(values) if values else None

    def cell(self, *path: str, digits: int = 3, sign: bool = False) -> str:
        """``0.812 ± 0.011``: the mean over seeds and their standard deviation, where there are several."""
        values = self.values(*path)
        if not values:
            return NONE
        shown = number(statistics.fmean(values), digits, sign)
        return f"{shown} ± {number(statistics.stdev(values), digits)}" if len(values) > 1 else shown

    @property
    def seconds(self) -> dict[str, float]:
        """Mean seconds by stage."""
        names = dict.fromkeys(name for result in self.results for name in result["seconds"])
        return {name: self.mean("seconds", name) or 0.0 for name in names}

    @property
    def shown_rate(self) -> str:
        return NONE if self.rate is None else f"{self.rate:g}"


def rows_of(table: Table, results: Results) -> list[Row]:
    """A row for each arm that has a result, in the table's order."""
    rows = []
    for arm in table.arms:
        known, rate = table.chosen(arm, results)
        ended = [results[arm.name, seed, rate] for seed in table.range if (arm.name, seed, rate) in results]
        if known and ended:
            rows.append(Row(arm, rate, ended))
    return rows


Cells = tuple[list[str], list[list[str]]]  # header and rows


def main_table(rows: Sequence[Row]) -> Cells:
    header = [
        "arm", "seeds", "proxy reward", "gold reward", "gain, proxy", "gain, gold", "KL to ρ", "perplexity", "length",
        "distinct-2",
    ]  # fmt: skip
    lines = [
        [
            row.arm.name,
            str(len(row.results)),
            *(row.cell(reward, "mean") for reward in REWARDS),
            *(row.cell(reward, "gain", "mean", sign=True) for reward in REWARDS),
            ("≤ " if row.results[0]["kl"]["n"] == 0 and row.mean("kl", "mean") else "")
            + row.cell("kl", "mean", digits=2),
            row.cell("perplexity", digits=1),
            row.cell("length_mean", digits=1),
            row.cell("distinct_2"),
        ]
        for row in rows
    ]
    return header, lines


def meaning_table(rows: Sequence[Row]) -> Cells:
    return ["arm", "what is done", "stands for"], [
        [row.arm.name, row.arm.meaning, row.arm.paper or NONE] for row in rows
    ]


def cost_table(rows: Sequence[Row]) -> Cells:
    """What an arm takes; times are sums over its stages, those that others did for it included."""
    header = [
        "arm", "learning rate", "steps", "responses sampled", "tokens sampled", "tokens trained", "models in memory",
        "peak memory, GB", "seconds", "of which by stage",
    ]  # fmt: skip
    lines = [
        [
            row.arm.name,
            row.shown_rate,
            *(
                quantity(round(row.mean(name) or 0))
                for name in ("steps", "samples", "tokens_sampled", "tokens_trained")
            ),
            number(row.mean("models_resident"), 0),
            NONE if (peak := row.mean("peak_memory_bytes")) is None else number(peak / 1e9, 2),
            number(sum(row.seconds.values()), 0),
            ", ".join(f"{name} {seconds:.0f}" for name, seconds in row.seconds.items() if seconds >= 0.5),
        ]
        for row in rows
    ]
    return header, lines


def seed_table(rows: Sequence[Row]) -> Cells:
    """Every seed's gain with its interval over prompts."""

    def gain(result: Mapping[str, Any], reward: str) -> str:
        found = (result.get(reward) or {}).get("gain")
        if not found:
            return NONE
        return f"{number(found['mean'], sign=True)} [{number(found['low'])}, {number(found['high'])}]"

    header = ["arm", "seed", "gain, proxy [95 % interval]", "gain, gold [95 % interval]", "KL to ρ", "load"]
    lines = [
        [row.arm.name, str(result["seed"]), *(gain(result, reward) for reward in REWARDS),
         number(result["kl"]["mean"], 2), number(result["load"], 1)]
        for row in rows
        for result in row.results
    ]  # fmt: skip
    return header, lines


def rate_table(table: Table, results: Results) -> Cells:
    """The reward that trains at each rate, on the prompts on which rates are chosen; the chosen one in brackets.

    Means over the seeds that were run at every rate, which choose; before there is one, over those of each rate.
    """
    lines = []
    for arm in table.arms:
        if not arm.has_rate:
            continue
        _, chosen = table.chosen(arm, results)
        whole = rate_rewards(arm.name, table.rates, results)
        cells = []
        for rate in table.rates:
            found = [one[rate] for one in whole.values()] or [
                one["rate_reward"] for key, one in results.items() if (key[0], key[2]) == (arm.name, rate)
            ]
            shown = number(sum(found) / len(found)) if found else NONE
            cells.append(f"[{shown}]" if rate == chosen else shown)
        lines.append([arm.name, str(len(whole)), *cells])
    return ["arm", "seeds", *(f"{rate:g}" for rate in table.rates)], lines


def differences(rows: Sequence[Row]) -> list[str]:
    """Where arms that train differ in optimiser steps or in sampled responses, in sentences."""
    training = [row for row in rows if row.arm.has_rate]
    sentences = []
    for key, what in (("steps", "optimiser steps"), ("samples", "sampled responses")):
        groups: dict[int, list[str]] = {}
        for row in training:
            groups.setdefault(round(row.mean(key) or 0), []).append(row.arm.name)
        if len(groups) > 1:
            each = "; ".join(f"{count:,}: {', '.join(names)}" for count, names in sorted(groups.items()))
            sentences.append(f"Arms differ in {what}: {each}.")
    return sentences
