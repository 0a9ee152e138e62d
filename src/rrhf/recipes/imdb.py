"""The paper's IMDB task (Appendix C): prompts of 64 tokens from the hub's reviews, in sets that share none.

25,000 reviews to train on; of the others 5,000 to validate and 5,000 to test, chosen by the seed (which ones RL4LMs
took is not known).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from rrhf.common.errors import UserError
from rrhf.recipes.demo.data import Review, clean_text, prompt_records
from rrhf.records.record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA, TOKENIZER = "stanfordnlp/imdb", "gpt2"
PROMPT_TOKENS, RESPONSE_TOKENS = 64, 48
PART = 5_000  # reviews to validate on, and as many to test on


def training_prompts(limit: int | None = None, seed: int = 0) -> Iterator[Record]:
    """Records of the training reviews, each with its own continuation; a run's ``data.source``."""
    return islice(_records(_reviews("train", seed)), limit)


def validation_prompts(limit: int | None = None, seed: int = 0) -> Iterator[Record]:
    """Records to choose settings on; a run's ``data.held_out``."""
    return islice(_records(_reviews("test", seed)[:PART]), limit)


def held_out_prompts(limit: int | None = None, seed: int = 0) -> Iterator[Record]:
    """Records to test on, none of which is among ``validation_prompts``; a run's ``data.held_out``."""
    return islice(_records(_reviews("test", seed)[PART : 2 * PART]), limit)


def _records(reviews: list[Review]) -> Iterator[Record]:
    return prompt_records(reviews, _tokenizer(), PROMPT_TOKENS, RESPONSE_TOKENS)


def _reviews(split: str, seed: int) -> list[Review]:
    """The reviews of a split, each text once, shuffled: the data set has the negative ones first."""
    from datasets import load_dataset

    try:
        rows = load_dataset(DATA, split=split)
    except (OSError, ValueError) as error:
        raise UserError(f"data set {DATA}: cannot be loaded: {error}") from error
    reviews = list(
        {text: Review(text, int(row["label"])) for row in rows if (text := clean_text(row["text"]))}.values()
    )
    random.Random(f"{seed}/{split}").shuffle(reviews)
    return reviews


def _tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)
