"""On what something was computed: versions and machine, and no name of host or user."""

from __future__ import annotations

import importlib.metadata
import json
import platform

from rrhf.common.environment import environment


def test_versions_and_machine_without_names() -> None:
    found = environment()
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["versions"]["Python"] == platform.python_version() and found["versions"]["rrhf"]
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_bytes"] > 10**8
    assert set(found["machine"]) <= {"system", "processor", "cores", "memory_bytes", "accelerators"}
    assert json.loads(json.dumps(found)) == found
