"""Faults in every stage, from fixed seeds; ``make test-faults`` has the long form. Each prints what it injected."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.injection import applies, inject
from faults.stages import MOMENTS, STAGES, World, a_world

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")
pytest.importorskip("choix", reason="the extra `judging` is not installed")

# One fault of each kind, spread over the stages: whole runs, online runs and reproductions are killed in each of their
# stages by tests/recipes already.
SHORT = [
    ("kill", "sample"), ("kill", "score"), ("kill", "train"), ("kill", "evaluate"), ("kill", "reward-model"),
    ("kill", "judge"), ("kill", "ppo"), ("signal", "sample"), ("signal", "judge"), ("signal", "train"),
    ("disk full", "score"), ("disk full", "train"), ("removed", "sample"), ("removed", "train"), ("damaged", "score"),
    ("damaged", "train"), ("clock", "score"), ("second run", "sample"), ("second run", "train"), ("second run", "run"),
    ("kill", "report"), ("NaN", "train"), ("NaN", "ppo"), ("chaos", "source"), ("chaos", "judge"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with a_world(tmp_path_factory.mktemp("world")) as found:
        yield found


@pytest.mark.parametrize(("fault", "stage"), SHORT)
def test_nothing_is_lost(fault: str, stage: str, world: World) -> None:
    outcome = inject(world, stage, fault, seed=1, moments=MOMENTS[stage])
    print(outcome.line())
    assert not outcome.lost


def test_every_stage_and_every_fault_is_met() -> None:
    assert {stage for _, stage in SHORT} >= set(STAGES) - {"online", "reproduce"}
    assert all(applies(fault, stage) for fault, stage in SHORT) and set(MOMENTS) == set(STAGES)
