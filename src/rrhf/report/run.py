"""What the report knows of a run: one record, which ``load`` reads from a folder and the pages are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rrhf.common.presentation import finite
from rrhf.evaluation.held_out import HeldOut
from rrhf.evaluation.pairs import Violation
from rrhf.evaluation.samples import Samples


@dataclass(frozen=True)
class Generation:
    """What ρ and π wrote for one held-out prompt. ``query`` is a list of (role, text); plain text has the role "".

    ``number`` is its line in the file. A model that was not evaluated wrote "" and has no rewards.
    """

    number: int
    query: tuple[tuple[str, str], ...]
    rho: str
    pi: str
    rho_rewards: dict[str, float | None]
    pi_rewards: dict[str, float | None]
    rho_finish: str
    pi_finish: str


@dataclass(frozen=True)
class RankedPair:
    """The most violated pair of a training sample: the response that scores higher, and the one that π likes better.

    ``better`` and ``worse`` are (text, source, score r, p under π, p under ρ or None); ``violation`` has the margin.
    """

    query: tuple[tuple[str, str], ...]
    better: tuple[str, str, float, float, float | None]
    worse: tuple[str, str, float, float, float | None]
    violation: Violation


@dataclass(frozen=True)
class Window:
    """The samples of one window of a training that samples as it goes (OP-k)."""

    step: int
    samples: Samples


@dataclass(frozen=True)
class Run:
    """One run folder, read. Empty values stand for missing files; ``missing`` says which and why.

    ``settings`` are the configuration's, ``training`` what ``model/training.json`` says, ``environments`` on what its
    stages were done, ``fingerprints`` (stage, input, digest).
    """

    name: str
    settings: dict[str, str]
    training: dict[str, Any]
    environments: list[dict[str, Any]]
    fingerprints: list[tuple[str, str, str]]
    evaluation: dict[str, Any]
    rewards: dict[str, dict[str, Any]]
    held: HeldOut
    generations: list[Generation]  # those on the page
    generations_file: str
    ranked: list[RankedPair]
    ranked_file: str
    history: list[dict[str, float]]
    samples: Samples | None
    windows: list[Window]
    timings: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def main_reward(self) -> str | None:
        """The name of the reward that the gain is measured with: the first one of ``evaluation.json``."""
        return next(iter(self.rewards), None)

    @property
    def seed(self) -> int:
        """Of the bootstraps: the evaluation's."""
        return int(finite(self.evaluation.get("seed")) or 0)
