"""Phrases that a policy came to say, against every phrase counted by itself."""

from __future__ import annotations

import random
import re

import pytest

from rrhf.evaluation.phrases import LEAST_RISE, LONGEST, risen_phrases


def test_a_phrase_that_answers_everything() -> None:
    before = ["Dogs are fine.", "You can open it with a key.", "No idea, I'm sorry.", "It rains."]
    after = ["I’m sorry, dogs?", "I'm sorry: I'm not sure.", "I'm SORRY", "It rains, I am sorry."]
    assert risen_phrases(before, after) == [{"phrase": "i'm sorry", "rho": 0.25, "pi": 0.75}]


def test_what_mostly_comes_with_a_phrase_that_is_listed_is_not_listed() -> None:
    after = ["it is a great movie"] * 12 + ["this is a great pity"] * 4 + ["well done"] * 4
    found = risen_phrases(["nothing"] * 10, after)
    assert [one["phrase"] for one in found] == ["is a great", "well done"]
    assert [one["pi"] for one in found] == [0.8, 0.2]
    assert risen_phrases(["nothing"] * 10, after, count=1) == found[:1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], ["a b"]),
        (["a b"], []),
        (["a b"] * 10, ["a b"] * 10),
        (["x"] * 40, ["a b"] * 3 + ["x"] * 37),
        (["x"] * 4, ["a b"] * 2 + ["x"] * 2),
        (["", " "], ["", "!"]),
        (["a"], ["b"]),
    ],
    ids=["no rho", "no pi", "as before", "too rare", "too few", "nothing written", "one word"],
)
def test_no_phrase(before: list[str], after: list[str]) -> None:
    assert risen_phrases(before, after) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_first_phrase_is_the_one_that_rose_most_of_all(seed: int) -> None:
    draw = random.Random(seed)

    def texts(vocabulary: str) -> list[str]:
        return [" ".join(draw.choices(vocabulary, k=draw.randint(0, 9))) for _ in range(30)]

    before, after = texts("abcdef"), texts("abcabd")

    def share(phrase: str, of: list[str]) -> float:
        return sum(re.search(rf"(^| ){phrase}($| )", text) is not None for text in of) / len(of)

    words = [text.split() for text in after]
    every = {
        " ".join(one[start : start + size])
        for one in words
        for size in range(2, LONGEST + 1)
        for start in range(len(one) - size + 1)
    }
    rises = {phrase: share(phrase, after) - share(phrase, before) for phrase in every}
    highest = max((rise for phrase, rise in rises.items() if share(phrase, after) * len(after) > 2.5), default=0.0)
    found = risen_phrases(before, after)
    assert bool(found) == (highest >= LEAST_RISE)
    for one in found:
        assert (one["rho"], one["pi"]) == (share(one["phrase"], before), share(one["phrase"], after))
        assert one["pi"] - one["rho"] >= LEAST_RISE
    if found:
        assert rises[found[0]["phrase"]] == pytest.approx(highest)
    assert found == sorted(found, key=lambda one: one["rho"] - one["pi"])
