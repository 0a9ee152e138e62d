"""Unigram and trigram models over token ids: what a language model has to beat to have learnt anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DISCOUNT = 0.75


@dataclass(frozen=True)
class Counts:
    """How often each n-gram was seen: ``keys`` [n], sorted, an n-gram as one number in base V; ``counts`` [n]."""

    keys: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray) -> Counts:
        return cls(*np.unique(keys, return_counts=True))

    def __getitem__(self, keys: np.ndarray) -> np.ndarray:
        """The counts of n-grams, 0 for unseen ones."""
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.counts[places], 0)


@dataclass(frozen=True)
class Order:
    """Interpolated absolute discounting of one order n over the order below (Kneser and Ney 1995).

    P_n(w | h) = max(c(h w) − D, 0) / c(h) + D · N(h) / c(h) · P_{n−1}(w | h'), with N(h) the different words seen
    after h; c counts occurrences at the highest order, and different words in front below it. P_{n−1} where c(h) = 0.
    """

    grams: Counts
    histories: Counts  # c(h)
    followers: Counts  # N(h)

    @classmethod
    def of(cls, grams: Counts, base: int) -> Order:
        histories, place = np.unique(grams.keys // base, return_inverse=True)
        totals = np.bincount(place, weights=grams.counts).astype(np.int64)
        return cls(grams, Counts(histories, totals), Counts(histories, np.bincount(place)))

    def probabilities(self, keys: np.ndarray, base: int, below: np.ndarray) -> np.ndarray:
        """P_n of n-grams, given P_{n−1} of what is left without their first word."""
        total, followers = self.histories[keys // base], self.followers[keys // base]
        seen = total > 0
        total = np.where(seen, total, 1)
        interpolated = (np.maximum(self.grams[keys] - DISCOUNT, 0) + DISCOUNT * followers * below) / total
        return np.where(seen, interpolated, below)


class Trigrams:
    """P(w | u v) by interpolated Kneser-Ney over texts of token ids, and the plain unigram model beside it."""

    def __init__(self, texts: Sequence[Sequence[int]], vocabulary: int) -> None:
        self.base = vocabulary
        triples = Counts.of(np.concatenate([self._keys(text) for text in texts]))
        pairs = Counts.of(triples.keys % vocabulary**2)  # different words in front of each pair
        words = Counts.of(pairs.keys % vocabulary)
        self.triples, self.pairs = Order.of(triples, vocabulary), Order.of(pairs, vocabulary)
        self.words = words
        self.unigrams = np.bincount(np.concatenate([np.asarray(text) for text in texts]), minlength=vocabulary)

    def _keys(self, text: Sequence[int]) -> np.ndarray:
        """The trigrams that end at each token from the second on; before a text stands its first token again."""
        ids = np.concatenate([np.asarray(text[:1]), np.asarray(text)]).astype(np.int64)
        return (ids[:-2] * self.base + ids[1:-1]) * self.base + ids[2:]

    def logprobs(self, text: Sequence[int]) -> np.ndarray:
        """log P of the tokens of a text but its first, each given the two before it."""
        keys = self._keys(text)
        uniform = 1 / self.base
        word = (np.maximum(self.words[keys % self.base] - DISCOUNT, 0)) / self.words.counts.sum()
        word = word + DISCOUNT * len(self.words.keys) / self.words.counts.sum() * uniform
        pair = self.pairs.probabilities(keys % self.base**2, self.base, word)
        return np.log(self.triples.probabilities(keys, self.base, pair))

    def unigram_logprobs(self, text: Sequence[int]) -> np.ndarray:
        """log P of the tokens of a text but its first, each by how often it was seen, plus one."""
        counts = self.unigrams[np.asarray(text[1:])] + 1
        return np.log(counts / (self.unigrams.sum() + self.base))
