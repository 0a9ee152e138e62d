"""A model's folder: what is in it goes and comes in an order in which nothing can be taken for something else."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.common.settings import refuse_other_settings
from rrhf.recipes.baselines.ppo import OneProcess
from rrhf.training.folder import SETTINGS, TRAINED, begun, complete, empty, last_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a training of two checkpoints left that was stopped."""
    for step in (2, 4):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text("{}", encoding="utf-8")
        (checkpoint / "optimizer.pt").write_bytes(b"moments")
    (tmp_path / SETTINGS).write_text(json.dumps({"seed": 1}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / ".cluster-1").mkdir()
    return tmp_path


def begin(folder: Path, overwrite: bool, **settings: Any) -> str:
    def remember() -> str:
        place = folder / SETTINGS
        if place.exists():
            refuse_other_settings(json.loads(place.read_text(encoding="utf-8")), settings, "holds", "others")
        place.write_text(json.dumps(settings), encoding="utf-8")
        return "remembered"

    return begun(folder, OneProcess(), overwrite, remember)


def test_a_stopped_training_of_the_same_settings_goes_on(folder: Path) -> None:
    assert begin(folder, overwrite=True, seed=1) == "remembered"
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")


@pytest.mark.parametrize("made", [None, "checkpoint-2", "model.safetensors", "windows", "watch"])
def test_a_training_without_a_step_binds_nobody_to_its_settings(made: str | None, tmp_path: Path) -> None:
    begin(tmp_path, overwrite=False, seed=1)
    if made is not None:
        (tmp_path / made).mkdir()
        with pytest.raises(UserError, match="seed was 1, is 2"):
            begin(tmp_path, overwrite=False, seed=2)
    else:
        assert begin(tmp_path, overwrite=False, seed=2) == "remembered"
    assert json.loads((tmp_path / SETTINGS).read_text(encoding="utf-8")) == {"seed": 2 if made is None else 1}


@pytest.mark.parametrize(
    "form", ["optimizer.bin", "optimizer_0/__0_0.distcp", "optimizer_0_rank0.bin", "global_step4/a.pt"]
)
def test_a_checkpoint_without_an_optimiser_is_not_gone_on_from(
    form: str, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``form``: what FSDP and DeepSpeed write in place of one file."""
    monkeypatch.setattr(logging.getLogger("rrhf"), "propagate", True)  # an earlier command may have set it
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    for check in (False, True):
        assert last_checkpoint(folder, check) == str(folder / "checkpoint-2")
    assert "checkpoint-4 lacks the optimiser's state" in caplog.text
    state = folder / "checkpoint-4" / form
    state.parent.mkdir(exist_ok=True)
    state.write_bytes(b"moments")
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")


@pytest.mark.parametrize("state", ["other settings", "finished", "damaged settings"])
def test_overwrite_removes_everything_else(state: str, folder: Path) -> None:
    if state == "finished":
        (folder / TRAINED).write_text("{}", encoding="utf-8")
    if state == "damaged settings":
        (folder / SETTINGS).write_text("{", encoding="utf-8")
    if state != "damaged settings":
        with pytest.raises(UserError):
            begin(folder, overwrite=False, seed=2)
        assert last_checkpoint(folder)
    begin(folder, overwrite=True, seed=1 if state == "finished" else 2)
    assert sorted(path.name for path in folder.iterdir()) == [".cluster-1", SETTINGS]


def test_what_no_training_wrote_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear …", encoding="utf-8")
    with pytest.raises(UserError, match=r"letter\.txt.*no training wrote that"):
        begin(tmp_path, overwrite=True, seed=1)
    assert (tmp_path / "letter.txt").exists()


def test_killed_while_it_is_emptied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint that was there is gone on from, and the folder still says whose it is."""
    (folder / TRAINED).write_text("{}", encoding="utf-8")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        empty(folder)
    assert last_checkpoint(folder) is None
    assert (folder / SETTINGS).exists() and (folder / TRAINED).exists()
    monkeypatch.undo()
    empty(folder)
    assert [path.name for path in folder.iterdir()] == [".cluster-1"]


def test_the_weights_are_on_the_disk_before_the_folder_counts_as_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut loses what nobody waited for; the checkpoints are removed right after."""
    synced: list[tuple[int, bool]] = []

    def sync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (folder / TRAINED).exists()))

    monkeypatch.setattr(os, "fsync", sync)
    complete(folder, {"steps": 4})
    assert ((folder / "model.safetensors").stat().st_ino, False) in synced
    assert json.loads((folder / TRAINED).read_text(encoding="utf-8")) == {"steps": 4}
