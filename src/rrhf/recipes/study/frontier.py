"""Rewards at equal KL to ρ: what an arm gains where it has moved as far as another.

An arm at its own rate stands at its own KL, and more KL buys more reward. The runs of an arm from one seed, one a
learning rate, are points of its frontier. Between two of them the gain is taken to be linear in √KL, as rewards near ρ
are (arXiv 2210.10760); outside of them, and between two that are far apart, nothing is said: further out gains bend
down, and the chord of a wide pair lies below them.
"""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np

from rrhf.recipes.reproduce.scale import REWARDS
from rrhf.recipes.study.results import Study
from rrhf.recipes.study.statistics import Estimate, bootstrap
from rrhf.recipes.study.verdicts import SEEDS, Test, adjusted

DISTANCES = (2.0, 5.0, 10.0, 20.0)  # KL to ρ, nats a response
WIDEST = 3.0  # how many times as far from ρ, in √KL, the further of two runs may be
RIVALS = ("RRHF-DP", "OP", "SimPO")  # that a better recipe must beat: hinge on samples of ρ and of π, SimPO for lists


def gains_at(study: Study, name: str, seed: int, distance: float, reward: str) -> np.ndarray | None:
    """What the arm gains on every prompt [prompts] where its KL to ρ is ``distance``, in nats a response.

    None where no two of its runs lie about it, or the further one is more than ``WIDEST`` times as far.
    """
    if seed not in study.seeds("start"):
        return None
    start = study.rewards("start", reward, [seed])[0]
    points = sorted(
        (
            (float(line["kl"]["mean"]) ** 0.5, np.array(line["prompts"][reward], dtype=float) - start)
            for line in study.lines
            if (line["arm"], line["seed"]) == (name, seed) and "prompts" in line and line["kl"]["mean"] > 0
        ),
        key=lambda point: point[0],
    )
    for (near, low), (far, high) in pairwise(points):
        if near <= distance**0.5 <= far <= WIDEST * near:
            share = (distance**0.5 - near) / (far - near)
            return np.asarray((1 - share) * low + share * high)
    return None


def values_at(study: Study, name: str, distance: float, reward: str, other: str | None = None) -> np.ndarray | None:
    """The arm's gains [seeds, prompts] at that KL, or its gains less those of ``other`` there.

    Of the seeds whose runs lie about it; None where there is none, or no such reward.
    """
    rows = []
    if reward not in study.known_rewards:
        return None
    for seed in study.common_of_any_rate(name, *([] if other is None else [other])):
        found = gains_at(study, name, seed, distance, reward)
        against = np.zeros(1) if other is None else gains_at(study, other, seed, distance, reward)
        if found is not None and against is not None:
            rows.append(found - against)
    return np.array(rows) if rows else None


def at_equal_kl(study: Study, name: str, distance: float, reward: str, other: str | None = None) -> Estimate | None:
    """The mean of ``values_at``, with its interval."""
    values = values_at(study, name, distance, reward, other)
    return None if values is None else bootstrap(values)


def rivalries(study: Study) -> list[Test]:
    """Every other arm against each rival at equal KL, in both rewards, p-values adjusted together."""
    tests = []
    for name in study.names:
        if name in (*RIVALS, "start"):
            continue
        for rival, distance, reward in product(RIVALS, DISTANCES, REWARDS):
            found = at_equal_kl(study, name, distance, reward, rival) if rival in study.names else None
            if found is not None and found.seeds >= SEEDS:
                tests.append(Test(f"{name} − {rival} at KL {distance:g}, {reward}", found))
    return adjusted(tests)
