"""Records of the reviews: their first tokens are the query, what follows the provided response."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from rrhf.recipes.demo.data import Review, prompt_records
from rrhf.recipes.micro.language_model import LanguageModelSettings, language_model
from rrhf.recipes.micro.reviews import split_micro
from rrhf.records.record import Record

PROMPT_TOKENS, RESPONSE_TOKENS = 16, 32


def training_prompts(
    limit: int | None = None, seed: int = 0, settings: LanguageModelSettings | None = None
) -> Iterator[Record]:
    """Records of the training reviews; a run's ``data.source``. The sets are the same for every ``seed``.

    ``settings``: of the language model whose tokens the prompts are counted in.
    """
    return _prompts(split_micro().training, limit, settings)


def held_out_prompts(
    limit: int | None = None, seed: int = 0, settings: LanguageModelSettings | None = None
) -> Iterator[Record]:
    """Records of the held-out reviews; a run's ``data.held_out``."""
    return _prompts(split_micro().held_out, limit, settings)


def _prompts(
    reviews: tuple[Review, ...], limit: int | None, settings: LanguageModelSettings | None
) -> Iterator[Record]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language_model(settings))
    return islice(prompt_records(reviews, tokenizer, PROMPT_TOKENS, RESPONSE_TOKENS), limit)
