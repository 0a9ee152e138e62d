"""What stands on disk of a window is used again only as it was written."""

from __future__ import annotations

from pathlib import Path

from rrhf.training.windows import Windows


def test_a_damaged_window_is_made_again(tmp_path: Path) -> None:
    windows, made_of = Windows(tmp_path), {"weights": "a", "queries": "b"}
    windows.begin(0, made_of)
    windows.records(0).write_text("whole\n", encoding="utf-8")
    windows.begin(0, made_of)  # killed before it was noted: what is there is kept
    assert windows.records(0).exists()
    windows.finish(0, {})
    assert windows.is_whole(0)
    windows.records(0).write_text("whoIe\n", encoding="utf-8")  # a bit of the disk
    assert not windows.is_whole(0) and not windows.differences(0, made_of)
    windows.begin(0, made_of)
    assert not windows.records(0).exists()
