"""The cluster that the tests of this room share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from support.nodes import PATIENT, Nodes, started


@pytest.fixture(scope="package")
def nodes() -> Iterator[Nodes]:
    pytest.importorskip("ray")
    paths = [path for path in sys.path if path.endswith("src")]  # nodes find the package as this process does
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATIENT.items():
            patch.setenv(name, value)
        patch.setenv("OMP_NUM_THREADS", "1")  # as the processes of the other tests: the same sums
        patch.setenv("PYTHONPATH", os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]))
        running = started(lambda: Nodes(2))
        try:
            yield running
        finally:
            import ray

            ray.shutdown()
            running.cluster.shutdown()
