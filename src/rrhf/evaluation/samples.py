"""What a file of scored responses holds, as rows of Table 6 of the paper (arXiv 2304.05302): rewards, by source too,
lengths beside them, and what the best of n of them are worth. Read once; texts are not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.presentation import clean
from rrhf.common.scores import score_levels
from rrhf.evaluation.best_of_n import best_of_n_curve
from rrhf.evaluation.metrics import mean_interval, ratio_bootstrap
from rrhf.records.files import read_records
from rrhf.records.inspection.statistics import Correlation
from rrhf.records.record import Record
from rrhf.records.sources import source_names

Interval = dict[str, float]  # mean, low, high: a 95 % bootstrap interval

CURVE_QUERIES = 4000  # from the front, of which the best of n is taken: its interval needs no more
CURVE_SAMPLES = 1000  # of its bootstrap


@dataclass(frozen=True)
class SourceSamples:
    """The scored responses of one source.

    ``mean`` and ``length`` (characters) have intervals over queries. ``best`` is its share of the queries' best
    responses, ties shared, out of all queries with a score; ``share`` of all scored responses, which is what chance
    would give. ``cut`` is the share cut by a token limit. A response that several sources gave and merging made one
    counts for each of them, so that shares can sum to more than 1.
    """

    name: str
    n: int
    mean: Interval
    std: float
    length: Interval
    best: float
    share: float
    cut: float


@dataclass(frozen=True)
class Samples:
    """The training samples' rewards, as in Table 6 of the paper.

    ``mean`` and ``std`` are over all scored responses, ``mean_max`` is the mean over queries of the best response's
    reward; intervals are of the bootstrap over queries. Numbers of draws ("top-k/0", "top-k/1") are put together in
    ``by_source``. ``curve`` is the reward of the best of n responses of a query, all sources together, as
    ``evaluation.best_of_n`` has it. ``correlation`` is Pearson's r of reward and length within queries.
    """

    queries: int
    responses: int
    unscored: int
    cut: int
    no_pairs: int
    fewest: int
    most: int
    mean: Interval
    std: float
    mean_max: Interval
    length: Interval
    correlation: float | None
    reward: str | None
    by_source: tuple[SourceSamples, ...]
    curve: tuple[dict[str, Any], ...]


def measure_samples(path: Path, reward: str | None, seed: int = 0) -> Samples | None:
    """Measure a file of scored records; None where no response has a score.

    Args:
        path: the records.
        reward: the reward to look at, where every record names it; else, and where None, ``scores`` is looked at,
            which is what training used.
        seed: of the bootstraps.

    Raises:
        UserError: the file cannot be read, or a record has no scores.
    """
    if reward is not None:
        try:
            return measure_records(scored_records(path), reward, seed)
        except KeyError:
            pass  # some record was not scored by this reward
    return measure_records(scored_records(path), None, seed)


def scored_records(path: Path) -> Iterator[Record]:
    """The records of a file; empty responses are no fault here: best-of-n's draws of nothing are draws."""
    for record in read_records(path):
        if not record.scores:
            raise UserError(f"{path}: record {record.id!r} has no scores: add them with `rrhf score`")
        yield record


def measure_records(records: Iterable[Record], reward: str | None, seed: int = 0) -> Samples | None:
    """As ``measure_samples``, of records. Raises ``KeyError`` where a record does not name ``reward``."""
    sums = _Sums()
    for record in records:
        sums.add(record, record.scores if reward is None else record.rewards[reward])
    return sums.result(reward, seed)


@dataclass(slots=True)
class _Group:
    """Scored responses put together: by query their number, their scores' and their lengths' sums."""

    sizes: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    squares: float = 0.0
    best: float = 0.0
    cut: int = 0

    def add(self, scores: Sequence[float], lengths: Sequence[int], best: float, cut: int) -> None:
        self.sizes.append(len(scores))
        self.sums.append(sum(scores))
        self.lengths.append(sum(lengths))
        self.squares += sum(score * score for score in scores)
        self.best += best
        self.cut += cut

    @property
    def n(self) -> int:
        return int(sum(self.sizes))

    def mean(self, seed: int) -> Interval:
        return ratio_bootstrap(self.sums, self.sizes, seed)

    def length(self, seed: int) -> Interval:
        return ratio_bootstrap(self.lengths, self.sizes, seed)

    def std(self) -> float:
        """The standard deviation with n in the denominator."""
        mean = sum(self.sums) / self.n
        return float(max(self.squares / self.n - mean * mean, 0.0) ** 0.5)


@dataclass(slots=True)
class _Sums:
    """What the records so far come to."""

    all: _Group = field(default_factory=_Group)
    sources: dict[str, _Group] = field(default_factory=dict)
    maxima: list[float] = field(default_factory=list)  # one a query with a score
    sizes: list[int] = field(default_factory=list)  # responses a query
    first: list[Sequence[float | None]] = field(default_factory=list)  # scores of the first queries
    within: Correlation = field(default_factory=Correlation)  # of rewards and lengths, less their query's means
    cut: int = 0
    unscored: int = 0
    no_pairs: int = 0

    def add(self, record: Record, scores: Sequence[float | None]) -> None:
        """Add a record with the scores, one a response, that one reward or the sum of all gave it."""
        known = [(index, score) for index, score in enumerate(scores) if score is not None]
        levels = score_levels(score for _, score in known)
        self.sizes.append(len(record.responses))
        self.cut += record.finish.count("length")
        self.unscored += len(scores) - len(known)
        self.no_pairs += len(set(levels)) < 2
        if len(self.first) < CURVE_QUERIES:
            self.first.append(scores)
        if not known:
            return
        self.maxima.append(max(score for _, score in known))
        wins = levels.count(max(levels))
        members: dict[str, list[int]] = {}  # source → its places in ``known``
        for place, (index, _) in enumerate(known):
            for name in source_names(record.sources[index]):
                members.setdefault(name, []).append(place)
        lengths = [len(record.responses[index]) for index, _ in known]
        cuts = [record.finish[index] == "length" for index, _ in known]
        groups = {None: (self.all, list(range(len(known))))}
        groups |= {name: (self.sources.setdefault(name, _Group()), places) for name, places in members.items()}  # type: ignore[misc]
        for group, places in groups.values():
            best = sum(levels[place] == max(levels) for place in places) / wins
            group.add([known[p][1] for p in places], [lengths[p] for p in places], best, sum(cuts[p] for p in places))
        self._correlate([score for _, score in known], lengths, len(set(levels)) > 1)

    def _correlate(self, scores: Sequence[float], lengths: Sequence[int], differ: bool) -> None:
        mean, length = sum(scores) / len(scores), sum(lengths) / len(lengths)
        for score, characters in zip(scores, lengths, strict=True):
            # Exactly 0 where all scores are equal: a rounded mean would leave noise to correlate.
            self.within.add(characters - length, score - mean if differ else 0.0)

    def result(self, reward: str | None, seed: int) -> Samples | None:
        if not self.maxima:
            return None
        mean_max = mean_interval(self.maxima, seed)
        assert mean_max is not None
        return Samples(
            queries=len(self.sizes),
            responses=sum(self.sizes),
            unscored=self.unscored,
            cut=self.cut,
            no_pairs=self.no_pairs,
            fewest=min(self.sizes),
            most=max(self.sizes),
            mean=self.all.mean(seed),
            std=self.all.std(),
            mean_max=mean_max,
            length=self.all.length(seed),
            correlation=self.within.result(),
            reward=reward,
            by_source=tuple(self._source(name, group, seed) for name, group in sorted(self.sources.items())),
            curve=tuple(best_of_n_curve(self.first, self.first, seed, samples=CURVE_SAMPLES)),
        )

    def _source(self, name: str, group: _Group, seed: int) -> SourceSamples:
        return SourceSamples(
            name=clean(name),
            n=group.n,
            mean=group.mean(seed),
            std=group.std(),
            length=group.length(seed),
            best=group.best / len(self.maxima),
            share=group.n / self.all.n,
            cut=group.cut / group.n,
        )
