"""Lengths, sources, diversity and scores of a file's records, and what ranking can learn from them, in one pass.

Kept in memory are the distinct lengths with their counts, 8 bytes a score, and the responses of at most
``SELF_BLEU_QUERIES`` queries; nothing else grows with the file.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rrhf.common.scores import score_levels
from rrhf.records.inspection.diversity import Distinct, SelfBleuSample, Words
from rrhf.records.inspection.statistics import Correlation, histogram, mean, share, std, summarise_lengths
from rrhf.records.record import Record, query_text
from rrhf.records.sources import source_names

NO_SIGNAL_SHARE = 0.2  # more than this share of queries without a ranking signal is worth a warning


def inspect_records(records: Iterable[Record]) -> dict[str, Any]:
    """Measure records in one pass; the result is plain JSON.

    Scores: ``mean`` and ``std`` (of the population) over all scored responses and ``mean_of_maxima`` over the queries'
    best, as in the paper's Table 6; ``std_within_query`` is the mean of the queries' own deviations. A query's win is
    shared by the responses that tie for it; a source's ``win_share`` is out of all queries with a score, and
    ``response_share`` is what chance would give it. ``tied_pairs`` are pairs of one query's responses with equal
    scores (as ``rrhf.common.scores`` has it). A query whose scores have fewer than two distinct values carries no
    ranking signal. A response that several sources gave and merging made one counts for each of them, so shares by
    source can then sum to more than 1.

    Diversity, by source: ``distinct_1`` and ``distinct_2`` are the distinct share of the words and word pairs in the
    source's responses to one query, averaged over queries; ``self_bleu`` is the mean BLEU-4 (zero counts as 0.1) of
    each response against the others of its source to the same query, over at most ``SELF_BLEU_QUERIES`` queries and
    ``SELF_BLEU_RESPONSES`` responses each. Words are split at white space.
    """
    inspection = _Inspection()
    for record in records:
        inspection.add(record)
    return inspection.result()


@dataclass(slots=True)
class _Source:
    """What one source, or all of them together, has given so far."""

    responses: int = 0
    queries: int = 0
    cut: int = 0  # by a token limit
    wins: float = 0.0
    scores: array[float] = field(default_factory=lambda: array("d"))
    maxima: array[float] = field(default_factory=lambda: array("d"))
    deviations: array[float] = field(default_factory=lambda: array("d"))
    distinct: tuple[Distinct, Distinct] = field(default_factory=lambda: (Distinct(1), Distinct(2)))

    def add_texts(self, record: Record, words: Sequence[Words], indices: Sequence[int]) -> None:
        """Add the responses at ``indices`` of one query; ``words`` are those of all the query's responses."""
        self.responses += len(indices)
        self.queries += 1
        self.cut += sum(record.finish[index] == "length" for index in indices)
        for distinct in self.distinct:
            distinct.add([words[index] for index in indices])

    def add_scores(self, scores: Sequence[float], wins: float) -> None:
        """Add the scores of one query's responses and the source's share of winning it."""
        self.scores.extend(scores)
        self.maxima.append(max(scores))
        self.deviations.append(std(scores))
        self.wins += wins

    def diversity(self, self_bleu: float | None) -> dict[str, Any]:
        return {
            "responses": self.responses,
            "queries": self.queries,
            "truncated": share(self.cut, self.responses),
            "distinct_1": self.distinct[0].result(),
            "distinct_2": self.distinct[1].result(),
            "self_bleu": self_bleu,
        }

    def summarise_scores(self, scored_queries: int, all_responses: int) -> dict[str, Any]:
        return {
            "n": len(self.scores),
            "mean": mean(self.scores),
            "std": std(self.scores),
            "std_within_query": mean(self.deviations),
            "mean_of_maxima": mean(self.maxima),
            "min": min(self.scores),
            "max": max(self.scores),
            "win_share": share(self.wins, scored_queries),
            "response_share": share(self.responses, all_responses),
        }


@dataclass(slots=True)
class _Lengths:
    """Lengths of texts in words and in characters, each with how often it occurs."""

    words: Counter[int] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)

    def add(self, text: str, words: Words) -> None:
        self.words[len(words)] += 1
        self.characters[len(text)] += 1

    def result(self) -> dict[str, Any]:
        return {"words": summarise_lengths(self.words), "characters": summarise_lengths(self.characters)}


@dataclass(slots=True)
class _Ranking:
    """What ranking can learn from the scores so far, and how they go with length in characters."""

    scored_queries: int = 0
    unscored_queries: int = 0
    unscored_responses: int = 0
    no_signal: int = 0  # queries with fewer than two distinct scores
    pairs: int = 0
    tied: int = 0
    across: Correlation = field(default_factory=Correlation)  # of length and score, over all responses
    within: Correlation = field(default_factory=Correlation)  # the same, less the means of their query

    def add(self, record: Record, scored: Mapping[int, float]) -> None:
        """Add a record with responses, and the score of each that has one."""
        self.unscored_responses += len(record.responses) - len(scored)
        self.unscored_queries += not scored
        counts = Counter(score_levels(scored.values()))
        self.no_signal += len(counts) < 2
        if not scored:
            return
        self.scored_queries += 1
        self.pairs += len(scored) * (len(scored) - 1) // 2
        self.tied += sum(count * (count - 1) // 2 for count in counts.values())
        lengths = [float(len(record.responses[index])) for index in scored]
        mean_length = mean(lengths)
        mean_score = mean(list(scored.values()))
        for length, score in zip(lengths, scored.values(), strict=True):
            self.across.add(length, score)
            # Exactly 0 where all scores are equal: a rounded mean would leave noise to correlate.
            self.within.add(length - mean_length, score - mean_score if len(counts) > 1 else 0.0)


class _Inspection:
    """What the records so far hold."""

    def __init__(self) -> None:
        self.ks: Counter[int] = Counter()  # k → how many queries have so many responses
        self.finish: Counter[str] = Counter()
        self.queries = _Lengths()
        self.responses = _Lengths()
        self.empty = 0
        self.repeated_responses = 0
        self.repeated_queries = 0
        self.sources: dict[str, _Source] = {}
        self.overall = _Source()
        self.ranking = _Ranking()
        self.sample = SelfBleuSample()

    def add(self, record: Record) -> None:
        self.ks[len(record.responses)] += 1
        query = query_text(record.query)
        self.queries.add(query, query.split())
        if record.responses:
            self._add_texts(record)
            self._add_scores(record)

    def _add_texts(self, record: Record) -> None:
        words = [response.split() for response in record.responses]
        for response, split in zip(record.responses, words, strict=True):
            self.responses.add(response, split)
        self.finish.update(record.finish)
        self.empty += sum(not split for split in words)
        repeated = len(record.responses) - len(set(record.responses))
        self.repeated_responses += repeated
        self.repeated_queries += repeated > 0

        members: dict[str, list[int]] = {}  # source → its responses
        for index, tag in enumerate(record.sources):
            for name in source_names(tag):
                members.setdefault(name, []).append(index)
        for name, indices in members.items():
            self.sources.setdefault(name, _Source()).add_texts(record, words, indices)
        self.overall.add_texts(record, words, range(len(words)))
        self.sample.add(self.ks.total(), record.id, words, members)

    def _add_scores(self, record: Record) -> None:
        scored = {index: score for index, score in enumerate(record.scores) if score is not None}
        self.ranking.add(record, scored)
        if not scored:
            return
        levels = score_levels(scored.values())
        wins = [level == max(levels) for level in levels]
        by_source: dict[str, list[tuple[float, bool]]] = {}
        for (index, score), won in zip(scored.items(), wins, strict=True):
            for name in source_names(record.sources[index]):
                by_source.setdefault(name, []).append((score, won))
        for name, scores in by_source.items():
            share_of_wins = sum(won for _, won in scores) / sum(wins)
            self.sources[name].add_scores([score for score, _ in scores], wins=share_of_wins)
        self.overall.add_scores(list(scored.values()), wins=1)

    def result(self) -> dict[str, Any]:
        n, ranking = self.ks.total(), self.ranking
        answered = n - self.ks[0]
        no_signal_share = share(ranking.no_signal, answered)
        return {
            "n": n,
            "responses": self.overall.responses,
            "k": {str(k): self.ks[k] for k in sorted(self.ks) if self.ks[k]},
            "lengths": {"query": self.queries.result(), "response": self.responses.result()},
            "finish": dict(sorted(self.finish.items())),
            "truncated": share(self.finish["length"], self.overall.responses),
            "empty_responses": self.empty,
            "duplicates": {"responses": self.repeated_responses, "queries": self.repeated_queries},
            "diversity": self._diversity(),
            **self._scores(),
            "ties": {"pairs": ranking.pairs, "tied": ranking.tied, "share": share(ranking.tied, ranking.pairs)},
            "score_length_correlation": {"overall": ranking.across.result(), "within_query": ranking.within.result()},
            "unscored": {"responses": ranking.unscored_responses, "records": ranking.unscored_queries},
            "no_signal": {"queries": ranking.no_signal, "share": no_signal_share},
            "histograms": {
                "query words": histogram(self.queries.words.keys(), self.queries.words.values()),
                "response words": histogram(self.responses.words.keys(), self.responses.words.values()),
                "scores": histogram(self.overall.scores),
                "best score of a query": histogram(self.overall.maxima),
            },
            "warnings": self._warnings(answered, no_signal_share),
        }

    def _diversity(self) -> dict[str, Any]:
        self_bleu = self.sample.result()
        return {
            "self_bleu_queries": len(self.sample.kept),
            "all": self.overall.diversity(self_bleu.get(None)),
            "by_source": {name: source.diversity(self_bleu.get(name)) for name, source in sorted(self.sources.items())},
        }

    def _scores(self) -> dict[str, Any]:
        whole = self.ranking.scored_queries, self.overall.responses
        return {
            "scores": self.overall.summarise_scores(*whole) if self.overall.scores else None,
            "scores_by_source": {
                name: source.summarise_scores(*whole) for name, source in sorted(self.sources.items()) if source.scores
            },
        }

    def _warnings(self, answered: int, no_signal_share: float | None) -> list[str]:
        if not self.ranking.scored_queries or no_signal_share is None or no_signal_share <= NO_SIGNAL_SHARE:
            return []
        return [
            f"{self.ranking.no_signal} of {answered} queries ({no_signal_share:.0%}) carry no ranking signal: they "
            "have fewer than two distinct scores, so only their best response is fitted. Sample more, or more varied, "
            "responses, or use a reward that tells them apart."
        ]
