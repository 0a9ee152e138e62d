"""When a cluster that does not start fails a test, and when the machine is to blame."""

from __future__ import annotations

import os
from typing import Any

import pytest

from support import nodes


def fails() -> Any:
    raise RuntimeError("The current node timed out during startup. This could happen because …")


@pytest.mark.parametrize(("load", "long", "skips"), [(1.0, False, False), (99.0, False, True), (99.0, True, False)])
def test_only_a_busy_machine_skips(monkeypatch: pytest.MonkeyPatch, load: float, long: bool, skips: bool) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(nodes, "LONG", long)
    with pytest.raises(pytest.skip.Exception if skips else nodes.TooBusyError):
        nodes.started(fails)


def test_other_faults_are_told_at_once() -> None:
    calls = []

    def start() -> None:
        calls.append(1)
        raise RuntimeError("no such flag")

    with pytest.raises(RuntimeError, match="no such flag"):
        nodes.started(start)
    assert len(calls) == 1
