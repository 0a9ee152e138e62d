"""Faults in every stage, from fixed seeds; ``make test-faults`` has the long form. Each prints what it injected."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from faults.injection import applies, inject
from faults.stages import MOMENTS, STAGES, World, a_world
from support import tiny

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


@pytest.mark.parametrize(
    ("command", "save"),
    [("train", "rrhf.training.stage:_save"), ("reward-model", "rrhf.training.reward_model.stage:_save")],
)
def test_no_step_comes_after_the_last(command: str, save: str, world: World) -> None:
    """Killed between the last checkpoint, which is within an epoch, and the weights: the steps are done."""
    arguments = (*STAGES[command].command, "--lr_scheduler_type", "constant")
    weights = []
    for name, faults in (("whole", []), ("killed", [tiny.die(save, 1)])):
        folder = world.folder(f"{command}-last-{name}", command)
        ended = tiny.warm(*arguments, cwd=folder, faults=faults)
        assert ended.code == (-signal.SIGKILL if faults else 0), ended.err
        if faults:
            ended = tiny.warm(*arguments, cwd=folder).done()
            assert "going on from out/checkpoint-4" in ended.err and "5/4" not in ended.err
        weights.append((folder / "out/model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_every_stage_and_every_fault_is_met() -> None:
    assert {stage for _, stage in SHORT} >= set(STAGES) - {"online", "reproduce"}
    assert all(applies(fault, stage) for fault, stage in SHORT) and set(MOMENTS) == set(STAGES)
