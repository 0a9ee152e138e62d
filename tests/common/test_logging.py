"""Messages in a file whose disk is full."""

from __future__ import annotations

import logging
from pathlib import Path

from rrhf.common.locks import only_process
from rrhf.common.logging import set_up_logging
from support import tiny

FULL = tiny.fill("common.test_logging:the_disk_is_full", 1, 0)


def the_disk_is_full() -> None:
    """From here on, where ``FULL`` is installed."""


def says_three_things(path: str) -> None:
    set_up_logging(Path(path))
    logging.getLogger("rrhf").info("line 0")
    the_disk_is_full()
    for number in (1, 2):
        logging.getLogger("rrhf").info(f"line {number}")


def locks(folder: str) -> None:
    the_disk_is_full()
    with only_process(Path(folder), "{who}"):
        pass


def run(function: str, path: Path) -> tiny.Result:
    return tiny.forks("common.test_logging")(f"common.test_logging:{function}", str(path), faults=[FULL])


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path: Path) -> None:
    ended = run("says_three_things", tmp_path / "log.txt").done()
    assert "Traceback" not in ended.err and "Logging error" not in ended.err
    assert [line for line in ended.err.splitlines() if line.startswith("line ")] == ["line 0", "line 1", "line 2"]
    assert ended.err.count("log.txt: cannot be written: File too large: free some space") == 1
    assert "line 0" in (tmp_path / "log.txt").read_text()


def test_a_folder_on_a_full_disk(tmp_path: Path) -> None:
    ended = run("locks", tmp_path / "out")
    assert ended.code == 2 and "out: cannot be written: File too large; free some space or choose" in ended.err
