"""Lines of progress where stderr is no terminal, by a clock that the test moves."""

from __future__ import annotations

import pytest

from rrhf.common import progress
from rrhf.common.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_batches_are_timed_whole(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("sample", 192, "records") as bar:
        for _ in range(3):
            clock[0] += 20
            for _ in range(64):
                bar.update()
    assert lines(capsys) == [
        "sample: 1/192 records, 0:20 elapsed",  # 64 are done: nothing can be said yet
        "sample: 65/192 records, 3.2 records/s, 0:40 elapsed, 0:39 left",
        "sample: 129/192 records, 3.2 records/s, 1:00 elapsed, 0:19 left",
        "sample: 192/192 records, 3.2 records/s, 1:00 elapsed",
    ]


def test_single_units_and_what_stood_there_before(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 10, "steps", done=2) as bar:
        for _ in range(8):
            clock[0] += 5
            bar.update(note="loss 1")
    found = lines(capsys)
    assert found[0] == "train: 5/10 steps, 0.2 steps/s, 0:15 elapsed, 0:25 left, loss 1"
    assert found[-1] == "train: 10/10 steps, 0.2 steps/s, 0:40 elapsed" and len(found) == 3
