"""The folder of a reproduction: where arms, their results and what they share stand, and who is at work on what.

prompts/                    queries.jsonl held_out.jsonl rates.jsonl: the same for all arms
shared/                     samples and scores that several arms train on; what ρ wrote, a seed
arms/ARM/seed-S/rate-R/     a run folder
results/ARM-seed-S-rate-R.json   one line, written whole when the arm has ended
report.md  report.html      the page
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rrhf.common.files import claimed_place, read_object, write_text
from rrhf.models.cache import Said
from rrhf.recipes.reproduce.arms import Arm
from rrhf.recipes.reproduce.data import Prompts


@dataclass(frozen=True)
class Item:
    """An arm from a seed at a learning rate: what one process does at a time."""

    arm: Arm
    seed: int
    rate: float | None

    @property
    def name(self) -> str:
        return "-".join([self.arm.folder, f"seed-{self.seed}", *([] if self.rate is None else [f"rate-{self.rate:g}"])])

    @property
    def path(self) -> Path:
        """Its folder's, below ``arms``."""
        rate = "once" if self.rate is None else f"rate-{self.rate:g}"
        return Path(self.arm.folder) / f"seed-{self.seed}" / rate


@dataclass
class Place:
    """The folder, as one process sees it."""

    folder: Path
    said: Said = field(default_factory=dict, repr=False)  # by models of held-out texts, in this process
    _claims: IO[bytes] | None = field(default=None, repr=False)

    @property
    def prompts(self) -> Prompts:
        return Prompts(self.folder / "prompts")

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def run(self, item: Item) -> Path:
        return self.folder / "arms" / item.path

    def result(self, item: Item) -> Path:
        return self.folder / "results" / f"{item.name}.json"

    def is_done(self, item: Item) -> bool:
        return self.result(item).exists()

    def write_result(self, item: Item, result: Mapping[str, Any]) -> None:
        write_text(self.result(item), json.dumps(result, ensure_ascii=False) + "\n")

    def results(self) -> list[dict[str, Any]]:
        """What has ended, by whoever and whenever."""
        return [read_object(path) for path in sorted((self.folder / "results").glob("*.json"))]

    @contextlib.contextmanager
    def claimed(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Hold a piece of work by its name, if no other process does; the system drops it where the process dies."""
        if self._claims is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One file for all: closing a second one would drop this process's locks.
            self._claims = (self.folder / "claims").open("ab")
        place = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
        with claimed_place(self._claims, place, wait) as mine:
            yield mine
