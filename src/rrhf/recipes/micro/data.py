"""The 25,000 packaged reviews in six sets that share none, and the records made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING

from rrhf.recipes.demo.data import Review, load_reviews, prompt_records
from rrhf.records.record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT, RATES, TRAINING, REWARD, GOLD = 1_000, 500, 1_500, 4_000, 4_000  # the language model gets the others
PROMPT_TOKENS, RESPONSE_TOKENS = 16, 32


@dataclass(frozen=True)
class MicroSplits:
    """Six sets of reviews of which no two share one, also not as an edited copy (``load_reviews``)."""

    held_out: tuple[Review, ...]  # evaluation prompts, and the perplexity of the language model
    rates: tuple[Review, ...]  # prompts on which learning rates are chosen
    training: tuple[Review, ...]  # training prompts
    reward: tuple[Review, ...]  # the reward that trains is fitted on these
    gold: tuple[Review, ...]  # the reward that only judges
    language: tuple[Review, ...]  # the language model, about 14,000


def split_micro() -> MicroSplits:
    """Cut the list of different reviews, whose order depends on their texts alone, at fixed places."""
    reviews = load_reviews()
    ends = list(accumulate((HELD_OUT, RATES, TRAINING, REWARD, GOLD)))
    held_out, rates, training, reward, gold, language = (
        reviews[start:end] for start, end in zip([0, *ends], [*ends, len(reviews)], strict=True)
    )
    return MicroSplits(held_out, rates, training, reward, gold, language)


def training_prompts(limit: int | None = None, seed: int = 0) -> Iterator[Record]:
    """Records of the training reviews; a run's ``data.source``. The sets are the same for every ``seed``."""
    return _prompts(split_micro().training, limit)


def rate_prompts(limit: int | None = None, seed: int = 0) -> Iterator[Record]:
    """Records of the reviews on which learning rates are chosen."""
    return _prompts(split_micro().rates, limit)


def held_out_prompts(limit: int | None = None, seed: int = 0) -> Iterator[Record]:
    """Records of the held-out reviews; a run's ``data.held_out``."""
    return _prompts(split_micro().held_out, limit)


def _prompts(reviews: tuple[Review, ...], limit: int | None) -> Iterator[Record]:
    return islice(prompt_records(reviews, _tokenizer(), PROMPT_TOKENS, RESPONSE_TOKENS), limit)


def _tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from rrhf.recipes.micro.language_model import language_model

    return AutoTokenizer.from_pretrained(language_model())
