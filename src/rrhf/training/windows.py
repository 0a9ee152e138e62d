"""The windows of a training that samples as it goes: what of each stands on disk, and whether it may be used again.

``windows/N.jsonl`` holds the scored records of window N in the order of its steps, with ``@STEP`` behind their ids;
``windows/N.json`` what they were made of, their checksum once they are whole, and what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrhf.common.files import read_object, write_text
from rrhf.common.settings import differences
from rrhf.records.checksums import checksum_of_file

FOLDER = "windows"  # in the model's folder
SECONDS = ("sample", "score")  # what a window's time goes into
WEIGHTS = "weights"  # in a note: the digest of the weights that sampled


class Windows:
    """The files of the windows in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def records(self, number: int) -> Path:
        return self.folder / f"{number}.jsonl"

    def _note(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def note(self, number: int) -> dict[str, Any]:
        """What is noted of a window; empty where nothing is."""
        return read_object(self._note(number))

    def is_whole(self, number: int) -> bool:
        """Whether the window's records are those that its note tells of."""
        file, known = self.records(number), self.note(number).get("sha256")
        return known is not None and file.exists() and checksum_of_file(file) == known

    def differences(self, number: int, made_of: Mapping[str, Any]) -> list[str]:
        """Where what a window was made of differs from ``made_of``, in words."""
        return list(differences(self.note(number).get("made_of", {}), json.loads(json.dumps(made_of))).values())

    def begin(self, number: int, made_of: Mapping[str, Any]) -> None:
        """Note what a window is going to be made of; what stands there of another one, or is damaged, goes first."""
        note = self.note(number)
        damaged = "sha256" in note and not self.is_whole(number)
        if damaged or note.get("made_of") != json.loads(json.dumps(made_of)):
            self.records(number).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._note(number), json.dumps({"made_of": made_of}, indent=1) + "\n")

    def finish(self, number: int, measured: Mapping[str, Any]) -> None:
        """Note that a window's records are whole, and what was measured."""
        note = {**self.note(number), **measured, "sha256": checksum_of_file(self.records(number))}
        write_text(self._note(number), json.dumps(note, indent=1) + "\n")

    def numbers(self) -> list[int]:
        """The windows that are noted, in order."""
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit())


def window_seconds(model_folder: Path) -> dict[str, float]:
    """How long sampling and scoring took in all windows of a model's training; empty where it had none."""
    windows = Windows(model_folder / FOLDER)
    notes = [windows.note(number) for number in windows.numbers()]
    return {name: sum(note.get(f"{name}_seconds", 0.0) for note in notes) for name in SECONDS} if notes else {}


def last_window(model_folder: Path) -> Path | None:
    """The records of the last window of a model's training; None where it had none."""
    windows = Windows(model_folder / FOLDER)
    return next((windows.records(n) for n in reversed(windows.numbers()) if windows.records(n).exists()), None)
