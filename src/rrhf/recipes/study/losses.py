"""The comparison of ranking losses: which arms differ in their loss alone, and what each costs and gains.

Losses train on k responses of ρ to a query (diverse beam search, as RRHF-DP does) and the data set's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rrhf.common.presentation import markdown_table, number
from rrhf.recipes.study.results import Line, Study
from rrhf.recipes.study.statistics import shown

HINGE = "RRHF-DP"
RIVALS = ("DPO", "SimPO", "KTO")  # losses that are arms under their own names
SAMPLES = {2: "+diverse-2", 4: "", 8: "+diverse-8"}  # k → how the names of arms with k samples end
LOOPS = 0.5  # a run loops where more of its texts do (fewer than half of their word pairs are different)
COLLAPSED = 0.1  # and has collapsed where fewer of the word pairs of all its texts are different


def hinge(k: int) -> str:
    return HINGE + SAMPLES[k]


def losses(study: Study, k: int) -> list[str]:
    """The arms that differ from the hinge's with k samples in their loss alone and were run at all of its rates."""
    suffix, grid = SAMPLES[k], set(study.rates(hinge(k)))
    bases = [name.removesuffix(suffix) for name in study.names if name.endswith(suffix)]
    alike = [base for base in bases if base in (HINGE, *RIVALS) or (base.startswith("loss:") and "+" not in base)]
    named = [base + suffix for base in alike]
    return [name for name in named if grid and grid <= set(study.rates(name)) and study.seeds(name)]


def gained(study: Study, name: str) -> float:
    """The mean over seeds of what an arm gained over ρ, in the reward that judges."""
    return float(study.numbers(name, study.judge, "gain", "mean").mean())


def by_gain(study: Study, names: Sequence[str]) -> list[str]:
    """Arms, the one that gained most first; of rewards alone one would win whose seeds ρ itself does better from."""
    return sorted(names, key=lambda name: -gained(study, name))


def loops(line: Line) -> bool:
    return bool(line["looping"] > LOOPS)


def collapsed(line: Line) -> bool:
    return bool(line["distinct_2"] < COLLAPSED)


def compared(study: Study) -> list[str]:
    """The part of the page: a table for each k with three losses or more."""
    parts = []
    for k in SAMPLES:
        names = losses(study, k)
        if len(names) > 2:
            parts += [f"#### {k} samples of ρ a query", _table(study, names, hinge(k))]
    if not parts:
        return []
    text = (
        "All losses of a table train on the same samples with the same steps, each at the best of the same rates by "
        "proxy reward, the mean over the seeds that were run at all of them. Of the runs at all rates it is told how "
        "many went astray: one loops where more than half of its texts do (fewer than half of their word pairs are "
        "different), and has collapsed where fewer than a tenth of the word pairs of all its texts are different. "
        "Seconds are the training's alone."
    )
    return ["### Losses on the same samples", text, *parts]


def _table(study: Study, names: Sequence[str], against: str) -> str:
    rows = []
    for name in by_gain(study, names):
        lines = list(study.seeds(name).values())
        runs = [line for line in study.lines if line["arm"] == name]
        less = None if name == against else study.difference(name, against, study.judge)
        rows.append([
            name, str(len(lines)), study.shown_rate(name),
            *(shown(study.gain(name, reward)) for reward in ("gold", "proxy")), shown(less),
            number(float(study.numbers(name, "kl", "mean").mean()), 1),
            *(f"{sum(map(went, runs))} of {len(runs)}" for went in (loops, collapsed)),
            number(float(np.median([line["seconds"].get("train", 0.0) for line in lines])), 0),
        ])  # fmt: skip
    header = ["loss", "seeds", "rate", "gain, gold", "gain, proxy", f"{study.judge} less the hinge's", "KL to ρ",
              "loops", "collapsed", "seconds"]  # fmt: skip
    return markdown_table(header, rows)
