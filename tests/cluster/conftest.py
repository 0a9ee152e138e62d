"""The cluster that the tests of this room share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.nodes import PATIENT, Nodes


@pytest.fixture(scope="package")
def nodes() -> Iterator[Nodes]:
    os.environ.update(PATIENT)  # read when Ray is imported
    pytest.importorskip("ray")
    os.environ["OMP_NUM_THREADS"] = "1"  # as the processes of the other tests: the same sums
    paths = [str(Path(path)) for path in sys.path if path.endswith("src")]  # nodes find the package as this process
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    running = Nodes(2)
    try:
        yield running
    finally:
        import ray

        ray.shutdown()
        running.cluster.shutdown()
