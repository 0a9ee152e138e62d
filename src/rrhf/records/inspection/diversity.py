"""How much a source's responses to one query differ: distinct-n, and self-BLEU over a sample of queries."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rrhf.records.inspection.statistics import mean, share

SELF_BLEU_QUERIES = 200  # those whose ids have the smallest hashes: the same whatever the order of the file
SELF_BLEU_RESPONSES = 16  # of one source to one query

Words = list[str]


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@dataclass(slots=True)
class Distinct:
    """Distinct-n: the distinct share of the n-grams in the responses to one query, averaged over queries."""

    n: int
    total: float = 0.0
    queries: int = 0

    def add(self, responses: Sequence[Words]) -> None:
        """Add the responses to one query; it does not count where none has as many as n words."""
        grams = [gram for words in responses for gram in ngrams(words, self.n)]
        if grams:
            self.total += len(set(grams)) / len(grams)
            self.queries += 1

    def result(self) -> float | None:
        return share(self.total, self.queries)


def bleu(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the sentence BLEU-4 of a list of words against others (Papineni et al. 2002).

    Clipped n-gram precisions for n = 1 … 4 (fewer where it has fewer words), a zero count taken as 0.1 (Chen and Cherry
    2014, method 1), their geometric mean times the brevity penalty against the closest reference length. A hypothesis
    that shares no word with a reference has 0.
    """
    logs = 0.0
    orders = min(4, len(hypothesis))
    if not orders:
        return 0.0
    for n in range(1, orders + 1):
        counts = Counter(ngrams(hypothesis, n))
        ceiling: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            ceiling |= Counter(ngrams(reference, n))
        matched = (counts & ceiling).total()
        if n == 1 and not matched:
            return 0.0
        logs += math.log((matched or 0.1) / counts.total()) / orders
    closest = min((len(reference) for reference in references), key=lambda size: (abs(size - len(hypothesis)), size))
    penalty = min(0.0, 1 - closest / len(hypothesis))
    return math.exp(logs + penalty)


def self_bleu(responses: Sequence[Sequence[str]]) -> float:
    """Return the mean BLEU of each of two or more responses (lists of words) against the others: 1 if all are equal."""
    return mean(
        [bleu(response, [*responses[:index], *responses[index + 1 :]]) for index, response in enumerate(responses)]
    )


@dataclass(slots=True)
class SelfBleuSample:
    """The queries on which self-BLEU is measured: ``SELF_BLEU_QUERIES`` of those with two or more responses."""

    # A heap of (a query's hash, negated; its number; the words of each source's responses to it). The source None is
    # all the query's responses together.
    kept: list[tuple[int, int, dict[str | None, list[Words]]]] = field(default_factory=list)

    def add(self, number: int, id: str, responses: list[Words], sources: Mapping[str, Sequence[int]]) -> None:
        """Keep a query if its id has one of the smallest hashes.

        Args:
            number: the query's place in the file, which breaks ties.
            id: the query's id.
            responses: the words of each response.
            sources: each source → which of the responses are its own.
        """
        digest = -int.from_bytes(hashlib.blake2b(id.encode("utf-8", "replace"), digest_size=8).digest(), "big")
        full = len(self.kept) == SELF_BLEU_QUERIES
        if len(responses) < 2 or (full and digest < self.kept[0][0]):
            return
        groups: dict[str | None, list[Words]] = {None: responses[:SELF_BLEU_RESPONSES]}
        for name, members in sources.items():
            if len(members) > 1:
                groups[name] = [responses[index] for index in members[:SELF_BLEU_RESPONSES]]
        (heapq.heappushpop if full else heapq.heappush)(self.kept, (digest, number, groups))

    def result(self) -> dict[str | None, float]:
        """Each source's self-BLEU, averaged over the kept queries to which it gave two or more responses."""
        values: dict[str | None, list[float]] = {}
        for _, _, groups in sorted(self.kept, key=lambda entry: entry[:2]):
            for name, responses in groups.items():
                values.setdefault(name, []).append(self_bleu(responses))
        return {name: mean(bleus) for name, bleus in values.items()}
