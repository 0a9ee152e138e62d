"""A real Ray cluster on this machine: nodes that are processes, which tests add and kill."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from rrhf.cluster.settings import ClusterSettings
from support.tiny import LONG

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
# A killed node refuses each check at once and is given up after five seconds; one that is merely slow has 10 s a check.
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 10}
BUSY = 4  # waiting processes a core: the tests and Ray's own come to two or three
# A busy machine is given time: nothing here depends on how long things take.
PATIENT = {
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # else Ray kills its own where others fill the machine's memory
}


class TooBusyError(Exception):
    """Ray's nodes did not start: each is given seconds for it by Ray, however busy the machine is."""


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node, in three tries."""
    for _ in range(3):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    raise TooBusyError


def started(start: Callable[[], Any]) -> Any:
    """What ``start`` gives, in three tries.

    Ray gives a node 30 seconds, which no setting lengthens. Where it failed three times the test fails too, unless
    other work than a test run's is seen on the machine: then it is skipped, but not in the long form.
    """
    try:
        return patiently(start)
    except TooBusyError:
        load, usual = os.getloadavg()[0], BUSY * (os.cpu_count() or 1)
        if LONG or load < usual:
            raise
        pytest.skip(f"Ray could not start its nodes in three tries: load {load:.0f}, a test run's is below {usual}")


class Nodes:
    """The cluster: this process's node, which has no CPUs for work, and those that work."""

    def __init__(self, working: int) -> None:
        from ray.cluster_utils import Cluster

        head = {**NODE, "num_cpus": 0, "_system_config": QUICK}
        self.cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        self.working: list = []
        self.have(working)

    def have(self, working: int) -> None:
        """So many nodes that work."""
        self.working = [node for node in self.working if node.live_processes()]
        while len(self.working) < working:
            self.working.append(patiently(lambda: self.cluster.add_node(**NODE)))

    def kill(self) -> None:
        """A node, with all that runs on it, as if its machine had been switched off."""
        self.cluster.remove_node(self.working.pop(), allow_graceful=False)

    def settings(self, **more: object) -> ClusterSettings:
        return ClusterSettings(self.cluster.address, **more)  # type: ignore[arg-type]
