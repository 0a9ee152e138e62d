"""Exactness on real prompts: SmolLM2 on dialogues of HH, batched, against ``generate`` and the unbatched oracle.

By default a few prompts, as every run of the tests can afford; with ``RRHF_LONG=1`` the number the project stands for
(``RRHF_LONG_PROMPTS`` for another one). In fp32 every difference must sit where the two scores are within 1e-5, and is
counted; in fp64 there is none.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from oracles.beam_search import LogProbs, diverse_beam_search, model_logprobs
from rrhf.models.load import ModelSettings, load_policy
from rrhf.models.tokenization import TextFormat, TextSettings
from rrhf.sampling.decoding import Response, decode
from rrhf.sampling.settings import POLICIES, SamplingSettings
from support.models import SMOLLM2

LONG = os.environ.get("RRHF_LONG") == "1"
PROMPTS = int(os.environ.get("RRHF_LONG_PROMPTS", "200")) if LONG else 2
FP64_PROMPTS, FP64_QUERY, FP64_NEW = 20, 64, 12
QUERY, NEW = (128, 32) if LONG else (24, 4)
BATCH = 16
CLOSE = 1e-5

BEAMS: dict[str, Any] = {"num_beams": 4}
DIVERSE: dict[str, Any] = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}

Responses = list[Response]


def prompts(folder: Path, tokenizer: PreTrainedTokenizerBase, count: int, longest: int) -> list[list[int]]:
    """Queries of HH: a dialogue up to the last turn of the assistant, its last ``longest`` tokens."""
    form = TextFormat(tokenizer, TextSettings(max_query_length=longest))
    mark = "\n\nAssistant:"
    with gzip.open(folder / "hh_harmless.jsonl.gz", "rt", encoding="utf-8") as file:
        dialogues = [json.loads(line)["chosen"] for line in file]
    return [form.encode_query(text[: text.rindex(mark) + len(mark)]) for text in dialogues[:count]]


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end token, and the end of a line, so that responses of this length do end."""
    return [tokenizer.eos_token_id, *tokenizer("\n").input_ids]


def ours(
    model: PreTrainedModel, queries: Sequence[list[int]], ends: Sequence[int], new: int, policy: str, **options: Any
) -> list[Responses]:
    """All queries in batches, mixed lengths together as they come."""
    settings = SamplingSettings(policy=policy, max_new_tokens=new, **options)
    results = []
    for begin in range(0, len(queries), BATCH):
        batch = queries[begin : begin + BATCH]
        state = POLICIES[policy](settings, [""] * len(batch), [set(ends)] * len(batch), None, torch.device("cpu"))
        results += decode(model, batch, state, new)
    return results


def as_response(tokens: Sequence[int], ends: Sequence[int]) -> Response:
    for place, token in enumerate(tokens):
        if token in ends:
            return Response(list(tokens[:place]), "stop")
    return Response(list(tokens), "length")


def by_generate(model: PreTrainedModel, query: list[int], ends: Sequence[int], new: int, num_beams: int) -> Responses:
    config = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=new,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    ids = torch.tensor([query])
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return [as_response(row, ends) for row in rows[:, len(query) :].tolist()]


def search(model: PreTrainedModel, query: list[int], ends: Sequence[int], new: int, **options: Any) -> Any:
    options = {"num_groups": options.pop("num_beam_groups", 1), **options}
    return diverse_beam_search(cached_logprobs(model, query), end_ids=ends, max_new_tokens=new, **options)


def cached_logprobs(model: PreTrainedModel, query: list[int]) -> LogProbs:
    """``model_logprobs`` with the query's keys in transformers' own cache, one sequence at a time."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([query[:-1]]), past_key_values=cache, use_cache=True)

    @functools.cache
    def next_logprobs(tokens: tuple[int, ...]) -> torch.Tensor:
        row = torch.tensor([[query[-1], *tokens]])
        with torch.no_grad():
            logits = model(input_ids=row, past_key_values=cache, use_cache=True).logits[0, -1]
        cache.crop(-row.shape[1])
        return torch.log_softmax(logits, dim=-1).double()

    return next_logprobs


def greedy_gap(model: PreTrainedModel, query: list[int], ends: Sequence[int], one: Response, other: Response) -> float:
    """The difference of the two log-probabilities where two greedy responses part."""
    first, second = ([*r.tokens, *([ends[0]] if r.finish == "stop" else [])] for r in (one, other))
    place = next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    logprobs = model_logprobs(model, query)(tuple(first[:place]))
    alternatives = [
        max(float(logprobs[token]) for token in (ends if r.finish == "stop" and place == len(r.tokens) else [t]))
        for r, t in ((one, first[place]), (other, second[place]))
    ]
    return abs(alternatives[0] - alternatives[1])


def count_differences(
    found: list[Responses],
    expected: list[Responses],
    gap: Callable[[int], float],
    record_property: Callable[[str, object], None],
) -> None:
    """Every difference must be a near tie; how many there are goes into the report."""
    different = [i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]
    gaps = {i: gap(i) for i in different}
    record_property("prompts", len(expected))
    record_property("differences", len(different))
    print(f"{len(different)} of {len(expected)} prompts differ, at gaps of {gaps}")
    assert all(value <= CLOSE for value in gaps.values()), gaps
    assert len(different) <= 0.03 * len(expected), gaps


# --- fp32 ---------------------------------------------------------------------------------------------------------


def test_greedy_in_fp32(test_data: Path, smollm2: tuple[Any, Any], record_property: Any) -> None:
    model, tokenizer = smollm2
    ends, queries = end_ids(tokenizer), prompts(test_data, tokenizer, PROMPTS, QUERY)
    expected = [by_generate(model, query, ends, NEW, 1) for query in queries]
    found = ours(model, queries, ends, NEW, "greedy")
    count_differences(
        found, expected, lambda i: greedy_gap(model, queries[i], ends, found[i][0], expected[i][0]), record_property
    )


def test_beam_in_fp32(test_data: Path, smollm2: tuple[Any, Any], record_property: Any) -> None:
    model, tokenizer = smollm2
    ends, queries = end_ids(tokenizer), prompts(test_data, tokenizer, PROMPTS, QUERY)
    expected = [by_generate(model, query, ends, NEW, 4) for query in queries]
    found = ours(model, queries, ends, NEW, "beam", **BEAMS)
    count_differences(found, expected, lambda i: search(model, queries[i], ends, NEW, **BEAMS).closest, record_property)


def test_diverse_beam_in_fp32(test_data: Path, smollm2: tuple[Any, Any], record_property: Any) -> None:
    model, tokenizer = smollm2
    ends, queries = end_ids(tokenizer), prompts(test_data, tokenizer, PROMPTS, QUERY)
    outcomes = [search(model, query, ends, NEW, **DIVERSE) for query in queries]
    expected = [[as_response(tokens, ends) for tokens in outcome.ranked()] for outcome in outcomes]
    found = ours(model, queries, ends, NEW, "diverse-beam", **DIVERSE)
    count_differences(found, expected, lambda i: outcomes[i].closest, record_property)


# --- fp64 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_fp64() -> tuple[Any, Any]:
    if not LONG:
        pytest.skip("takes minutes: set RRHF_LONG=1")
    model, tokenizer = load_policy(ModelSettings(model=SMOLLM2, device="cpu", dtype="float32"))
    return model.double(), tokenizer


@pytest.mark.parametrize("policy", ["greedy", "beam"])
def test_no_difference_from_generate_in_fp64(policy: str, test_data: Path, in_fp64: tuple[Any, Any]) -> None:
    model, tokenizer = in_fp64
    ends, queries = end_ids(tokenizer), prompts(test_data, tokenizer, FP64_PROMPTS, FP64_QUERY)
    options = BEAMS if policy == "beam" else {}
    expected = [by_generate(model, query, ends, FP64_NEW, options.get("num_beams", 1)) for query in queries]
    assert ours(model, queries, ends, FP64_NEW, policy, **options) == expected


def test_no_difference_from_the_oracle_in_fp64(test_data: Path, in_fp64: tuple[Any, Any]) -> None:
    model, tokenizer = in_fp64
    ends, queries = end_ids(tokenizer), prompts(test_data, tokenizer, FP64_PROMPTS, FP64_QUERY)
    expected = [
        [as_response(tokens, ends) for tokens in search(model, query, ends, FP64_NEW, **DIVERSE).ranked()]
        for query in queries
    ]
    assert ours(model, queries, ends, FP64_NEW, "diverse-beam", **DIVERSE) == expected
