"""Whole files or none."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.common.files import refuse_existing, replacing, write_text
from support import tiny


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    place = tmp_path / "new" / "folder" / "out.txt"
    write_text(place, "first ρ\n")
    with replacing(place) as temporary:
        temporary.write_text("second")
        assert place.read_text(encoding="utf-8") == "first ρ\n"
        assert temporary.parent == place.parent
    assert place.read_text() == "second"
    assert names(place.parent) == ["out.txt"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_after_any_exception_the_old_file_stands(error: BaseException, tmp_path: Path) -> None:
    place = tmp_path / "out.txt"
    write_text(place, "old")
    with pytest.raises(type(error)), replacing(place) as temporary:
        temporary.write_text("half")
        raise error
    assert place.read_text() == "old" and names(tmp_path) == ["out.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_late(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a full disk may come as late as the fsync."""
    place = tmp_path / "out.txt"
    write_text(place, "old")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=r"out\.txt: cannot write: No space left.*free some space"):
        write_text(place, "new")
    assert place.read_text() == "old" and names(tmp_path) == ["out.txt"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out\.txt: cannot write.*--output"):
        write_text(tmp_path / "file" / "out.txt", "text")


def test_an_error_of_another_file_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "out.txt"):
        (tmp_path / "input.txt").read_text()


def test_an_error_of_a_connection_is_not_ours(tmp_path: Path) -> None:
    """What is written may be read from somewhere on the way."""
    with pytest.raises(ConnectionResetError), replacing(tmp_path / "out.txt"):
        raise ConnectionResetError(104, "Connection reset by peer")


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    place = tmp_path / "out.txt"
    script = (
        "import os, signal, sys; from rrhf.common.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for name in (place, tmp_path / "out.txt.gz"):
        assert subprocess.run([sys.executable, "-c", script, name], check=False).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    with replacing(place) as mine:  # a process that lives keeps its own
        mine.write_text("first")
        write_text(place, "second")
        assert place.read_text() == "second"
        mine.write_text("first, and last")
    assert place.read_text() == "first, and last"
    assert [name for name in names(tmp_path) if not name.startswith(".out.txt.gz.")] == ["out.txt"]
    assert len(names(tmp_path)) == 2  # the other file's is not touched


def test_existing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("")
    with pytest.raises(UserError, match=r"out\.txt exists already: give --overwrite"):
        refuse_existing(tmp_path / "out.txt", overwrite=False)
    refuse_existing(tmp_path / "out.txt", overwrite=True)
    refuse_existing(tmp_path / "other.txt", overwrite=False)


# --- a full disk, as the commands meet it ----------------------------------------------------------------------------


def limited() -> None:
    """No file may grow past 4 KiB: writes fail as on a full disk, only with another number."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (["convert", "data.jsonl", "--format", "rrhf", "--output", "out.jsonl"], "out.jsonl"),
        (["convert", "data.jsonl", "--format", "rrhf", "--output", "out.parquet"], "out.parquet"),
        (["inspect", "data.jsonl", "--html", "page.html"], "page.html"),
    ],
)
def test_a_full_disk(command: list[str], output: str, tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "data.jsonl", tiny.rows(100))
    (tmp_path / output).write_text("good\n")
    result = tiny.cold(*command, "--overwrite", cwd=tmp_path, preexec_fn=limited)
    assert result.code == 2, result.err
    assert output in result.err and "cannot write: File too large" in result.err and "free some space" in result.err
    assert "Traceback" not in result.err
    assert (tmp_path / output).read_text() == "good\n"
    assert names(tmp_path) == sorted(["data.jsonl", output])
