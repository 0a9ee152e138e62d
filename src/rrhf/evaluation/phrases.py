"""Phrases that a policy came to say: what a reward pays for may be an expression, which its mean does not show."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rrhf.records.inspection.diversity import ngrams

WORD = re.compile(r"\w+(?:'\w+)*")
LONGEST = 4  # words
LEAST_RISE, FEWEST = 0.1, 3  # of the texts, and texts: less is no habit
SHOWN = 3

Phrase = tuple[str, ...]


def risen_phrases(before: Sequence[str], after: Sequence[str], count: int = SHOWN) -> list[dict[str, Any]]:
    """The phrases that stand in more of the texts ``after`` than of those ``before``, those that rose most first.

    A phrase is 2 to 4 words one after the other, in lower case, whatever stands between them. Left out are those that
    rose by less than a tenth of all texts, those of one text or two, and those of which more than half of the texts
    have a phrase that is listed already.

    Args:
        before, after: ρ's and π's texts.
        count: how many at most.

    Returns:
        ``phrase``, and in which shares of their texts it stands: ``rho`` and ``pi``.
    """
    if not before or not after:
        return []
    texts_of = _frequent([_words(text) for text in after], max(FEWEST, LEAST_RISE * len(after)))
    then = _count([_words(text) for text in before], set(texts_of))
    rise = {phrase: len(texts) / len(after) - then[phrase] / len(before) for phrase, texts in texts_of.items()}
    listed: list[Phrase] = []
    for phrase in sorted(rise, key=lambda phrase: (-rise[phrase], -len(phrase), phrase)):
        if len(listed) == count or rise[phrase] < LEAST_RISE:
            break
        texts = texts_of[phrase]
        if all(2 * len(texts & texts_of[other]) <= len(texts) for other in listed):
            listed.append(phrase)
    return [
        {"phrase": " ".join(phrase), "rho": then[phrase] / len(before), "pi": len(texts_of[phrase]) / len(after)}
        for phrase in listed
    ]


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower().replace("’", "'"))


def _frequent(texts: Sequence[Sequence[str]], least: float) -> dict[Phrase, set[int]]:
    """The phrases in at least so many texts, and in which; a phrase is looked at where its parts are so frequent."""
    found: dict[Phrase, set[int]] = {}
    shorter: dict[Phrase, set[int]] = {}
    for size in range(1, LONGEST + 1):
        texts_of: dict[Phrase, set[int]] = defaultdict(set)
        for index, words in enumerate(texts):
            for phrase in ngrams(words, size):
                if size == 1 or (phrase[1:] in shorter and phrase[:-1] in shorter):
                    texts_of[phrase].add(index)
        shorter = {phrase: where for phrase, where in texts_of.items() if len(where) >= least}
        if size > 1:
            found |= shorter
    return found


def _count(texts: Sequence[Sequence[str]], wanted: set[Phrase]) -> dict[Phrase, int]:
    """In how many texts each phrase stands."""
    counts = dict.fromkeys(wanted, 0)
    for words in texts:
        for phrase in {phrase for size in range(2, LONGEST + 1) for phrase in ngrams(words, size)} & wanted:
            counts[phrase] += 1
    return counts
