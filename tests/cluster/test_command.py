"""``--cluster`` on the command line: what is refused, and that nothing of Ray is touched without it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rrhf.cluster import connection
from rrhf.cluster.connection import connected
from rrhf.cluster.pool import open_pool
from rrhf.cluster.settings import ClusterSettings
from rrhf.cluster.training import training_on
from rrhf.common.errors import UserError
from rrhf.training.stage import train_model
from support import tiny

SCORES = """
import sys
from rrhf.cli.main import main
assert main(["score", "--data", "data.jsonl", "--reward", "tiny_rewards:vowels", "--output", "out.jsonl"]) == 0
print(sorted(name for name in sys.modules if name.partition(".")[0] == "ray"))
"""


def test_without_the_flag_ray_is_not_imported(tmp_path: Path) -> None:
    tiny.workplace(tmp_path, {})
    done = subprocess.run([sys.executable, "-c", SCORES], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and len(tiny.read_rows(tmp_path / "out.jsonl")) == 29
    assert open_pool(ClusterSettings()) is None and training_on(ClusterSettings()) is training_on(None) is train_model


def test_all_faults_of_the_settings_are_named() -> None:
    with pytest.raises(UserError) as caught:
        ClusterSettings("nowhere", cluster_workers=0, cluster_cpus=0, cluster_gpus=1.5, cluster_failures=-1)
    message = str(caught.value)
    for flag in ("cluster nowhere", "cluster_workers 0", "cluster_cpus 0", "cluster_gpus 1.5", "cluster_failures -1"):
        assert f"--{flag}: " in message
    with pytest.raises(UserError, match="run the command on a node of the cluster"):
        ClusterSettings("ray://host:10001")
    assert ClusterSettings("host:6379", cluster_gpus=0.25).cluster_gpus == 0.25


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rrhf\[ray\]'"), connected(ClusterSettings("auto")):
        pass


def test_an_address_where_nobody_answers() -> None:
    pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = pytest.raises(UserError, match=f"{address}: nobody answers there.*ray start --head")
        with refused, connected(ClusterSettings(address)):
            pass


def test_the_flags_of_run(tmp_path: Path) -> None:
    """Refused before any work; spelled with hyphens too."""
    tiny.workplace(tmp_path, {})
    refused = tiny.warm(
        "run", "config.yaml", "--output", "run", "--cluster", "x", "--cluster-workers", "0", cwd=tmp_path
    )
    assert refused.code == 2 and "--cluster x: give auto, local or HOST:PORT" in refused.err
    assert "--cluster_workers 0: must be at least 1" in refused.err and not (tmp_path / "run").exists()
