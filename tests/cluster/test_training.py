"""Training on a real cluster, whose node dies in the middle: the weights of an undisturbed run."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rrhf.cluster import training
from rrhf.cluster.settings import ClusterSettings
from rrhf.cluster.training import training_on
from rrhf.common.errors import UserError
from rrhf.models.adapters import AdapterSettings
from rrhf.models.load import ModelSettings
from rrhf.training.config import RRHFConfig
from support import tiny
from support.nodes import Nodes

# A loss of the user's own, which switches its node off before the fifth step is done, once. A record is a call.
LOSS = """
import os, signal
from pathlib import Path
from rrhf.losses import ranking_loss

calls = 0

def deadly(*arguments, **options):
    global calls
    calls += 1
    if calls == CALL and os.environ.get("RANK") == DIES and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getppid(), signal.SIGKILL)  # the node's own process, and this one: the machine is off
        os.kill(os.getpid(), signal.SIGKILL)
    return ranking_loss("hinge")(*arguments, **options)
"""


def train(place: Path, output: str, cluster: Any = None) -> dict[str, Any]:
    """Eight steps of four queries each, with a checkpoint after every second."""
    config = RRHFConfig(
        output_dir=output, num_train_epochs=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=4 // (cluster.cluster_workers if cluster else 1), max_length=64,
        learning_rate=0.01, save_steps=2, logging_steps=1, bf16=False, report_to="none", seed=5,
        ranking_loss="own_loss:deadly", use_cpu=True,
    )  # fmt: skip
    model = ModelSettings(str(place / "start"), "cpu", "float32")
    return training_on(cluster)(Path("scored.jsonl"), model, config, AdapterSettings())


def workplace(place: Path, dies: int, workers: int = 1) -> None:
    tiny.write_model(place / "start")
    tiny.write_rows(place / "scored.jsonl", tiny.rows(16, responses=3))
    (place / "own_loss.py").write_text(
        LOSS.replace("DIES", repr(str(dies))).replace("CALL", str(18 // workers)), encoding="utf-8"
    )


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def curve(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line["rank_loss"] for line in log if "rank_loss" in line]


def test_a_node_dies_while_training(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process: the weights are those of a training without a cluster, bit for bit."""
    nodes.have(2)
    monkeypatch.chdir(tmp_path)
    workplace(tmp_path, 0)
    summary = train(tmp_path, "cluster", nodes.settings(cluster_workers=1))
    assert (tmp_path / "died").exists() and summary["steps"] == 8
    alone = train(tmp_path, "alone")
    assert weights(tmp_path / "cluster") == weights(tmp_path / "alone")
    assert curve(tmp_path / "cluster") == curve(tmp_path / "alone") and alone["steps"] == 8
    assert not list((tmp_path / "cluster").glob(".cluster-*"))
    with pytest.raises(UserError, match="holds a finished model"):
        train(tmp_path, "cluster", nodes.settings(cluster_workers=1))


def on_no_cluster(folder: Path, overwrite: bool = False) -> dict[str, Any]:
    config, model = RRHFConfig(output_dir=str(folder), use_cpu=True, bf16=False), ModelSettings("start", "cpu")
    return training.train_on_cluster(
        ClusterSettings("local"), Path("scored.jsonl"), model, config, AdapterSettings(), overwrite=overwrite
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_command_is_refused_before_the_processes_work(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one has sent them its folder for what they tell each other, and none holds the output folder yet."""
    monkeypatch.setattr(training, "connected", lambda settings: nullcontext())
    monkeypatch.setattr(training, "share", lambda settings, device: training.Share(1, 1, 0))
    (tmp_path / ".cluster-of-one-that-was-killed").mkdir()
    seen: list[list[Path]] = []

    def fit(settings: ClusterSettings, job: Any, mine: training.Share) -> None:
        with pytest.raises(UserError, match="another command trains into this folder on a cluster: process"):
            on_no_cluster(tmp_path, overwrite)
        seen.append(list(tmp_path.glob(".cluster-*")))
        assert seen[0] == [job.scratch]
        (tmp_path / "training.json").write_text("{}")

    monkeypatch.setattr(training, "_fit", fit)
    on_no_cluster(tmp_path)
    assert seen and not list(tmp_path.glob(".cluster-*"))


def test_a_node_that_dies_when_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts the processes anew: there is nothing left to do, and nothing to refuse."""
    pytest.importorskip("ray")
    import ray.train
    import ray.train.collective

    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda data: data)
    (tmp_path / "training.json").write_text("{}")
    scratch = tmp_path / ".cluster-1"
    scratch.mkdir()
    config = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    model = ModelSettings("start", "cpu")
    job = training._Job(
        str(tmp_path), scratch, Path("scored.jsonl"), None, model, config, AdapterSettings(), None, None, None, False
    )
    monkeypatch.chdir(tmp_path)
    training._train({"job": job})
    assert not (scratch / training.REFUSED).exists()


@pytest.mark.skipif(not tiny.LONG, reason="five more processes: RRHF_LONG=1")
def test_a_node_dies_while_two_train(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.have(3)
    monkeypatch.chdir(tmp_path)
    workplace(tmp_path, 1, workers=2)
    train(tmp_path, "disturbed", nodes.settings(cluster_workers=2))
    assert (tmp_path / "died").exists()
    train(tmp_path, "undisturbed", nodes.settings(cluster_workers=2))
    train(tmp_path, "alone")
    assert weights(tmp_path / "disturbed") == weights(tmp_path / "undisturbed")
    assert curve(tmp_path / "disturbed") == pytest.approx(curve(tmp_path / "alone"), abs=1e-4)


@pytest.mark.skipif(not tiny.LONG, reason="a whole run on a cluster, and one without: RRHF_LONG=1")
def test_a_whole_run(nodes: Nodes, tmp_path: Path) -> None:
    """``rrhf run --cluster`` as a user gives it: every record, weight and number is that of a run without."""
    nodes.have(2)
    settings = tiny.config(tiny.write_model(tmp_path / "model"))
    for name, flags in (("alone", []), ("cluster", ["--cluster", nodes.cluster.address, "--cluster_workers", "1"])):
        place = tiny.workplace(tmp_path / name, settings)
        tiny.cold("run", "config.yaml", "--output", "run", *flags, cwd=place).done()
    for name in ("responses.jsonl", "scored.jsonl", "model/model.safetensors", "evaluation.json"):
        assert (tmp_path / "cluster/run" / name).read_bytes() == (tmp_path / "alone/run" / name).read_bytes(), name


@pytest.mark.parametrize("finished", [False, True])
def test_no_restart_overwrites_what_is_finished(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was stopped with other settings is replaced by the processes, which know the settings."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(training, "train_model", lambda *arguments, **options: given.update(options))
    if finished:
        (tmp_path / "training.json").write_text("{}", encoding="utf-8")
    config = {"output_dir": str(tmp_path), "report_to": "none"}
    job = training._Job(
        str(tmp_path), tmp_path / ".cluster-1", Path("d"), None, ModelSettings("m"), config, AdapterSettings(),
        None, None, None, True,
    )  # fmt: skip
    training._as_here(job)
    assert given["overwrite"] is not finished
