"""The 25,000 packaged reviews in six sets that share none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate

from rrhf.recipes.demo.data import Review, load_reviews

HELD_OUT, RATES, TRAINING, REWARD, GOLD = 1_000, 500, 1_500, 4_000, 4_000  # the language model gets the others


@dataclass(frozen=True)
class MicroSplits:
    """Six sets of reviews of which no two share one, also not as a copy whose beginning or end was edited."""

    held_out: tuple[Review, ...]  # evaluation prompts, and the perplexity of the language model
    rates: tuple[Review, ...]  # prompts on which learning rates are chosen
    training: tuple[Review, ...]  # training prompts
    reward: tuple[Review, ...]  # the reward that trains is fitted on these
    gold: tuple[Review, ...]  # the reward that only judges
    language: tuple[Review, ...]  # the language model, about 14,000


def split_micro() -> MicroSplits:
    """Cut the list of different reviews, whose order depends on their texts alone, at fixed places.

    Of reviews that share their last 100 letters and digits the first stays: copies that were edited further up.
    """
    reviews = tuple({_ending(review.text): review for review in reversed(load_reviews())}.values())[::-1]
    ends = list(accumulate((HELD_OUT, RATES, TRAINING, REWARD, GOLD)))
    held_out, rates, training, reward, gold, language = (
        reviews[start:end] for start, end in zip([0, *ends], [*ends, len(reviews)], strict=True)
    )
    return MicroSplits(held_out, rates, training, reward, gold, language)


def _ending(text: str) -> str:
    return re.sub(r"[\W_]+", "", text[-400:].lower())[-100:]
