"""The rewards of a run's training samples, beside which the report puts those of ρ and π (Table 6 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rrhf.common.presentation import clean
from rrhf.common.scores import score_levels
from rrhf.records.files import read_records
from rrhf.records.record import Record
from rrhf.records.sources import source_names


@dataclass(frozen=True)
class Samples:
    """The training samples' rewards, as in Table 6 of the paper (arXiv 2304.05302).

    ``mean`` and ``std`` are over all scored responses, ``mean_max`` is the mean over queries of the best response's
    reward, and ``by_source`` has (source, number, mean) with the numbers of draws ("top-k/0", "top-k/1") put together.
    A response that several sources gave and merging made one counts for each of them.
    """

    queries: int
    responses: int
    unscored: int
    cut: int
    no_pairs: int
    fewest: int
    most: int
    mean: float
    std: float
    mean_max: float
    reward: str | None
    by_source: tuple[tuple[str, int, float], ...]


def measure_samples(path: Path, reward: str | None) -> Samples | None:
    """Measure a file of scored records; None where no response has a score.

    Args:
        path: the records.
        reward: the reward to look at, where every record names it; else, and where None, ``scores`` is looked at,
            which is what training used.

    Raises:
        UserError: the file cannot be read, or a record has no scores.
    """
    if reward is not None:
        try:
            return _measure(path, reward)
        except KeyError:
            pass  # some record was not scored by this reward
    return _measure(path, None)


def _measure(path: Path, reward: str | None) -> Samples | None:
    """Raise ``KeyError`` where a record does not name ``reward``."""
    sums = _Sums()
    for record in read_records(path, require="scores"):
        sums.add(record, record.scores if reward is None else record.rewards[reward])
    return sums.result(reward)


@dataclass(slots=True)
class _Sums:
    """What the records so far come to."""

    sizes: list[int] = field(default_factory=list)  # responses a query
    scores: list[float] = field(default_factory=list)
    maxima: list[float] = field(default_factory=list)  # one a query with a score
    by_source: dict[str, list[float]] = field(default_factory=dict)
    cut: int = 0
    unscored: int = 0
    no_pairs: int = 0

    def add(self, record: Record, scores: Sequence[float | None]) -> None:
        """Add a record with the scores, one a response, that one reward or the sum of all gave it."""
        scored = [score for score in scores if score is not None]
        self.sizes.append(len(record.responses))
        self.cut += record.finish.count("length")
        self.unscored += len(scores) - len(scored)
        self.no_pairs += len(set(score_levels(scored))) < 2
        self.scores += scored
        if scored:
            self.maxima.append(max(scored))
        for tag, score in zip(record.sources, scores, strict=True):
            if score is not None:
                for name in source_names(tag):
                    self.by_source.setdefault(name, []).append(score)

    def result(self, reward: str | None) -> Samples | None:
        import numpy as np

        if not self.scores:
            return None
        return Samples(
            queries=len(self.sizes),
            responses=sum(self.sizes),
            unscored=self.unscored,
            cut=self.cut,
            no_pairs=self.no_pairs,
            fewest=min(self.sizes),
            most=max(self.sizes),
            mean=float(np.mean(self.scores)),
            std=float(np.std(self.scores)),
            mean_max=float(np.mean(self.maxima)),
            reward=reward,
            by_source=tuple(
                (clean(name), len(scores), float(np.mean(scores))) for name, scores in sorted(self.by_source.items())
            ),
        )
