"""The decode loop against transformers' ``generate`` and against the unbatched oracle, token for token.

Ours always runs all queries in one batch; the references run them one by one, so that nothing of a batch can hide.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, PreTrainedModel

from oracles.beam_search import Outcome, diverse_beam_search, model_logprobs
from rrhf.common.errors import UserError
from rrhf.models.kernels import choice, reference
from rrhf.models.kernels.cpu import blocked_cache, logits, products
from rrhf.models.kernels.cpu import device as cpu
from rrhf.models.path_check import usable_path
from rrhf.sampling import decoding as decoding_module
from rrhf.sampling import shared_cache, slot_columns
from rrhf.sampling.decoding import Response, decode
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import POLICIES, SamplingSettings
from rrhf.sampling.stepping import Advance
from support.models import in_fp64, tiny_model, tiny_tokenizer

VOCABULARY = 97
ENDS = (3, 11, 40)
FAMILIES = ("llama", "gpt2", "mistral", "gemma3")  # the last two with a window of 8


def lively(family: str, seed: int = 0, bias: float = 0.0, ends: Sequence[int] = ENDS) -> PreTrainedModel:
    """A tiny model whose next token depends on all it read, with ``bias`` on the logits of the end tokens."""
    model = tiny_model(family, VOCABULARY, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.3)
        head = torch.nn.Linear(model.config.hidden_size, VOCABULARY)
        head.weight.normal_(0.0, 0.3)
        head.bias.zero_()
        head.bias[list(ends)] = bias
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)
    return model.eval()


def some_queries(seed: int, count: int, longest: int = 14) -> list[list[int]]:
    """Queries of mixed lengths; the first has one token, the second is the longest."""
    generator = random.Random(seed)
    lengths = [1, longest, *(generator.randint(1, longest) for _ in range(count))][:count]
    return [[generator.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def ours(
    model: PreTrainedModel,
    queries: Sequence[list[int]],
    ends: Sequence[int] = ENDS,
    path: str = "tree",
    keys: Sequence[str] | None = None,
    **options: Any,
) -> list[list[Response]]:
    settings = SamplingSettings(**options)
    keys = keys or [str(query) for query in queries]
    policy = POLICIES[settings.policy](settings, keys, [set(ends)] * len(queries), None, torch.device("cpu"))
    return decode(model, queries, policy, settings.max_new_tokens, path)


def as_response(tokens: Sequence[int], ends: Sequence[int]) -> Response:
    """A reference's tokens up to its first end token, which is no part of the response."""
    for place, token in enumerate(tokens):
        if token in ends:
            return Response(list(tokens[:place]), "stop")
    return Response(list(tokens), "length")


def by_generate(
    model: PreTrainedModel, queries: Sequence[list[int]], ends: Sequence[int] = ENDS, **options: Any
) -> list[list[Response]]:
    """transformers' own generation, a query at a time; greedy, or all beams."""
    options = {"num_return_sequences": options.get("num_beams", 1), "num_beams": 1, **options}
    config = GenerationConfig(do_sample=False, eos_token_id=list(ends), pad_token_id=0, **options)
    results = []
    for query in queries:
        ids = torch.tensor([query])
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        results.append([as_response(row, ends) for row in rows[:, len(query) :].tolist()])
    return results


def searches(
    model: PreTrainedModel,
    queries: Sequence[list[int]],
    ends: Sequence[int] = ENDS,
    temperature: float = 1.0,
    **options: Any,
) -> list[Outcome]:
    return [
        diverse_beam_search(model_logprobs(model, query, temperature), end_ids=ends, **options) for query in queries
    ]


def by_oracle(
    model: PreTrainedModel, queries: Sequence[list[int]], ends: Sequence[int] = ENDS, **options: Any
) -> list[list[Response]]:
    return [
        [as_response(tokens, ends) for tokens in outcome.ranked()]
        for outcome in searches(model, queries, ends, **options)
    ]


def lengths_of(results: list[list[Response]]) -> set[int]:
    return {len(response.tokens) for responses in results for response in responses}


# --- transformers' generate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family: str) -> None:
    model, queries = lively(family, bias=2.0), some_queries(1, 24)
    expected = by_generate(model, queries, max_new_tokens=20)
    assert len(lengths_of(expected)) >= 6  # they end at all kinds of steps
    assert ours(model, queries, policy="greedy", max_new_tokens=20) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_beams", [1, 2, 3, 4, 5])
def test_beam_equals_generate(family: str, num_beams: int) -> None:
    model, queries = lively(family, seed=num_beams, bias=1.5), some_queries(num_beams, 12)
    options: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": 14}
    expected = by_generate(model, queries, **options)
    assert len(lengths_of(expected)) >= 2
    assert ours(model, queries, policy="beam", **options) == expected


@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("bias", [0.0, 1.5, 3.0])
def test_beam_finishes_as_generate_does(length_penalty: float, early_stopping: bool, bias: float) -> None:
    model, queries = lively("llama", seed=7, bias=bias), some_queries(2, 8)
    options: dict[str, Any] = {
        "num_beams": 3,
        "max_new_tokens": 12,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
    }
    assert ours(model, queries, policy="beam", **options) == by_generate(model, queries, **options)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("length_penalty", [-3.0, -6.0, -40.0])
def test_length_penalties_below_0_leave_no_place_empty(length_penalty: float, groups: int) -> None:
    """Scores of -10⁵⁵ and less, which fp32 has not: a place where nothing has finished is still worse."""
    case = {"num_beams": 3, "num_beam_groups": groups, "length_penalty": length_penalty, "max_new_tokens": 24}
    model, queries = lively("llama", seed=7, bias=1.5), some_queries(2, 4)
    in_fp32 = ours(model, queries, policy="diverse-beam", **case)
    assert all(response.tokens or response.end for responses in in_fp32 for response in responses)
    expected = by_oracle(model.double(), queries, diversity_penalty=1.0, **for_oracle(case))
    assert ours(model, queries, policy="diverse-beam", **case) == expected


def test_settings_of_beams_matter() -> None:
    """What the comparisons above vary does change the result; they would otherwise say nothing."""
    model, queries = lively("llama", seed=7, bias=1.5), some_queries(2, 8)
    plain = ours(model, queries, policy="beam", num_beams=3, max_new_tokens=12)
    for change in ({"length_penalty": 0.5}, {"length_penalty": 2.0}, {"early_stopping": True}):
        assert ours(model, queries, policy="beam", num_beams=3, max_new_tokens=12, **change) != plain, change


PROMPTS = (
    "The capital of France is",
    "Human: What should I do when my neighbour's dog barks all night?\n\nAssistant:",
    "def fibonacci(n):\n",
    "I watched this film twice, and the second time I noticed that the",
    "Once",
)


@pytest.fixture(scope="module")
def prompts(smollm2: tuple[Any, Any]) -> list[list[int]]:
    return [smollm2[1](prompt).input_ids for prompt in PROMPTS]


def test_smollm2_greedy_equals_generate(smollm2: tuple[Any, Any], prompts: list[list[int]]) -> None:
    model, tokenizer = smollm2
    ends = [tokenizer.eos_token_id]
    assert ours(model, prompts, ends, policy="greedy", max_new_tokens=8) == by_generate(
        model, prompts, ends, max_new_tokens=8
    )


def test_smollm2_beam_equals_generate(smollm2: tuple[Any, Any], prompts: list[list[int]]) -> None:
    model, tokenizer = smollm2
    # The end of a line ends a response too: the end token itself rarely comes this early.
    ends = [tokenizer.eos_token_id, *tokenizer("\n").input_ids]
    options: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 6}
    assert ours(model, prompts, ends, policy="beam", **options) == by_generate(model, prompts, ends, **options)


# --- the oracle ---------------------------------------------------------------------------------------------------


def random_case(seed: int) -> dict[str, Any]:
    choose = random.Random(seed)
    num_beams = choose.choice([4, 6])
    return {
        "num_beams": num_beams,
        "num_beam_groups": choose.choice([groups for groups in (1, 2, 4, num_beams) if num_beams % groups == 0]),
        "diversity_penalty": choose.choice([0.0, 0.5, 1.0, 100.0]),
        "length_penalty": choose.choice([0.5, 1.0, 2.0]),
        "early_stopping": choose.random() < 0.5,
        "max_new_tokens": choose.randint(1, 12),
        "temperature": choose.choice([1.0, 0.7]),
    }


def for_oracle(case: dict[str, Any]) -> dict[str, Any]:
    return {"num_groups" if name == "num_beam_groups" else name: value for name, value in case.items()}


@pytest.mark.parametrize("seed", range(36))
def test_diverse_beam_equals_the_oracle_in_fp64(seed: int) -> None:
    choose = random.Random(1000 + seed)
    ends = choose.sample(range(VOCABULARY), choose.choice([1, 2, 5]))
    model = lively(FAMILIES[seed % len(FAMILIES)], seed, choose.choice([0.0, 1.5, 3.0]), ends).double()
    queries, case = some_queries(seed, 4, longest=11), random_case(seed)
    assert ours(model, queries, ends, policy="diverse-beam", **case) == by_oracle(
        model, queries, ends, **for_oracle(case)
    ), case


@pytest.mark.parametrize("seed", range(4))
def test_the_last_step_counts_what_earlier_groups_chose_in_fp32_too(seed: int) -> None:
    """At the last step every candidate ends; later groups still avoid what earlier ones would have gone on with."""
    model, queries = lively("llama", 20 + seed, 2.0), some_queries(seed, 5)
    case: dict[str, Any] = {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0, "max_new_tokens": 2}
    assert ours(model, queries, policy="diverse-beam", **case) == by_oracle(model, queries, **for_oracle(case))


def test_the_oracle_with_one_group_equals_generate() -> None:
    """The reference is checked against the other reference."""
    model, queries = lively("llama", 5, 2.0), some_queries(5, 6)
    for change in ({}, {"length_penalty": 2.0}, {"early_stopping": True}):
        options: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 10, **change}
        assert by_oracle(model, queries, num_groups=1, **options) == by_generate(model, queries, **options)


def test_diverse_beam_by_hand() -> None:
    """Three groups of one beam over a fixed distribution: each takes what the ones before it left best."""

    settings = SamplingSettings(policy="diverse-beam", num_beams=3, max_new_tokens=2, diversity_penalty=1.0)
    policy = POLICIES["diverse-beam"](settings, ["a"], [{9}], None, torch.device("cpu"))
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    # Step 1: 0.5; then 0.5/e = 0.18 < 0.3; then 0.5/e = 0.184 > 0.15 and > 0.3/e: tokens 0, 1, 0.
    advance = policy.advance(probabilities.log(), torch.arange(1))
    assert advance.tokens.tolist() == [0, 1, 0]
    assert advance.slots.tolist() == [0, 1, 2]
    # Step 2: the same choices; the beams' scores carry the penalties of both steps.
    assert len(policy.advance(probabilities.log().expand(3, -1), advance.slots).slots) == 0
    assert [response.tokens for response in policy.results()[0]] == [[0, 0], [1, 1], [0, 0]]
    scores = policy.finished.flatten().exp() ** 2  # divided by the length 2
    torch.testing.assert_close(scores, torch.tensor([0.25, 0.09, 0.25 * torch.e**-2]).to(scores))


def test_smollm2_diverse_beam_equals_the_oracle(smollm2: tuple[Any, Any], prompts: list[list[int]]) -> None:
    model, tokenizer = smollm2
    ends = [tokenizer.eos_token_id, *tokenizer("\n").input_ids]
    queries = [prompts[0], prompts[4]]
    for groups in (2, 4):
        case = {"num_beams": 4, "num_beam_groups": groups, "diversity_penalty": 1.0, "max_new_tokens": 5}
        expected = by_oracle(model, queries, ends, **for_oracle(case))
        assert ours(model, queries, ends, policy="diverse-beam", **case) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diverse_beam_with_one_group_equals_beam(dtype: torch.dtype) -> None:
    model, queries = lively("llama", 3, 1.5).to(dtype), some_queries(3, 10)
    for penalty in (0.0, 1.0):
        diverse = {"policy": "diverse-beam", "num_beam_groups": 1, "diversity_penalty": penalty}
        assert ours(model, queries, **diverse, max_new_tokens=12) == ours(
            model, queries, policy="beam", max_new_tokens=12
        )


def test_without_penalty_groups_are_the_same_beam() -> None:
    model, queries = lively("llama", 4, 1.5).double(), some_queries(4, 6)
    diverse = ours(
        model, queries, policy="diverse-beam", num_beams=4, num_beam_groups=2, diversity_penalty=0.0, max_new_tokens=9
    )
    beams = ours(model, queries, policy="beam", num_beams=2, max_new_tokens=9)
    assert diverse == [[best, best, second, second] for best, second in beams]


# --- batches ------------------------------------------------------------------------------------------------------

POLICY_CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-p": {"top_p": 0.9, "num_responses": 3},
    "top-k": {"top_k": 5, "num_responses": 2},
    "beam": {"num_beams": 3},
    "diverse-beam": {"num_beams": 4, "num_beam_groups": 2},
}


@pytest.mark.parametrize("policy", POLICY_CASES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_is_decoded_beside_a_query_does_not_change_it(policy: str, family: str) -> None:
    model, queries = lively(family, 8, 1.5).double(), some_queries(8, 12)
    options = {"policy": policy, "max_new_tokens": 12, **POLICY_CASES[policy]}
    together = ours(model, queries, **options)
    assert [ours(model, [query], **options)[0] for query in queries] == together
    assert ours(model, queries[::-1], **options) == together[::-1]
    assert ours(model, queries[:5], **options) + ours(model, queries[5:], **options) == together


def test_queries_prefilled_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, queries = lively("llama", 9, 1.5).double(), some_queries(9, 9)
    options: dict[str, Any] = {"policy": "beam", "max_new_tokens": 8}
    whole = ours(model, queries, **options)
    monkeypatch.setattr(shared_cache, "PREFILL_TOKENS", 10)  # shorter than the longest query, too
    assert ours(model, queries, **options) == whole


@pytest.mark.parametrize("policy", POLICY_CASES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_query_that_stands_there_several_times_is_read_once(
    policy: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    class Watched(shared_cache.SharedCache):
        def _prefill(self, rows: Mapping[tuple[int, ...], Sequence[int]]) -> torch.Tensor:
            read.append(sum(len(query) for query in rows))
            return super()._prefill(rows)

    monkeypatch.setitem(decoding_module.STEPPERS, "tree", Watched)
    monkeypatch.setattr(shared_cache, "PREFILL_TOKENS", 20)  # several passes, which do not cut a query's copies apart
    model, queries = lively(family, 18, 1.5).double(), some_queries(18, 6)
    order = [0, 3, 1, 1, 5, 3, 2, 3, 4]
    options = {"policy": policy, "max_new_tokens": 12, **POLICY_CASES[policy]}
    keys = [str(i) for i in range(len(order))]  # copies draw differently, as records of ids of their own do
    repeated = ours(model, [queries[i] for i in order], keys=keys, **options)
    assert sum(read) == sum(len(query) for query in queries)
    assert repeated == [ours(model, [queries[i]], keys=[key], **options)[0] for key, i in zip(keys, order, strict=True)]


@pytest.mark.parametrize("policy", POLICY_CASES)
def test_buffers_are_packed_as_queries_finish(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries finish at very different steps; the live ones move in the buffers, and nothing else changes."""
    sizes: list[int] = []

    class Watched(shared_cache.SharedCache):
        def step(self, advance: Advance) -> torch.Tensor:
            logits = super().step(advance)
            sizes.append(len(self.visible))
            return logits

    monkeypatch.setitem(decoding_module.STEPPERS, "tree", Watched)
    model, queries = lively("llama", 10, 1.5).double(), some_queries(10, 30)
    options = {"policy": policy, "max_new_tokens": 25, **POLICY_CASES[policy]}
    packed = ours(model, queries, **options)
    assert len(set(sizes)) >= 4  # they shrank several times …
    assert sizes == sorted(sizes, reverse=True)
    monkeypatch.setattr(shared_cache, "COMPACT_BELOW", 0.0)
    assert ours(model, queries, **options) == packed  # … and not at all


def test_slots_of_a_query_finish_one_by_one() -> None:
    """Ended draws leave the forward pass while their neighbours go on; each reads only its own tokens."""
    model, queries = lively("gemma3", 11, 2.0).double(), some_queries(11, 6)
    options: dict[str, Any] = {"policy": "top-p", "num_responses": 5, "max_new_tokens": 15}
    results = ours(model, queries, **options)
    assert all(len({len(response.tokens) for response in responses}) > 1 for responses in results)
    for query, responses in zip(queries, results, strict=True):
        for fewer in (1, 3):  # a response's draws do not depend on how many are asked for
            alone = ours(model, [query], **{**options, "num_responses": fewer})[0]
            assert alone == responses[:fewer]


# --- long responses -----------------------------------------------------------------------------------------------

DRAW_CASES: dict[str, dict[str, Any]] = {
    "top-p": {"top_p": 0.95, "num_responses": 5},
    "top-k": {"top_k": 8, "num_responses": 2, "temperature": 1.3},
}


@pytest.mark.parametrize("policy", DRAW_CASES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("kernels", [cpu, reference])
def test_slots_that_read_their_own_columns_draw_the_same(
    kernels: Any, family: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows and soft caps, several blocks of columns, slots and queries that end at all kinds of steps."""
    model, queries = lively(family, 21, 1.0).double(), some_queries(21, 14, longest=20)
    options = {"policy": policy, "max_new_tokens": 30, **DRAW_CASES[policy]}
    expected = ours(model, queries, **options)
    assert len(lengths_of(expected)) >= 8
    sizes: list[int] = []

    class Watched(slot_columns.SlotColumns):
        def step(self, advance: Advance) -> torch.Tensor:
            logits = super().step(advance)
            sizes.append(len(self.prompt.visible))
            assert {len(blocks) for blocks in self.blocks.values()} == {(self.step_index + 6) // 7}
            return logits

    monkeypatch.setitem(choice.KERNELS, "cpu", kernels)
    monkeypatch.setattr(reference, "STEPS_BETWEEN_CHECKS", 4)
    monkeypatch.setattr(shared_cache, "COMPACT_BELOW", 0.95)
    monkeypatch.setattr(slot_columns, "BLOCK", 7)
    monkeypatch.setattr(decoding_module, "LONG", 1)
    monkeypatch.setattr(decoding_module, "SlotColumns", Watched)
    assert ours(model, queries, **options) == expected
    assert len(set(sizes)) >= 2  # buffers were packed anew
    sizes.clear()
    ours(model, queries, policy="beam", max_new_tokens=5)
    assert not sizes  # beams change places


@pytest.mark.parametrize(("policy", "steps"), [("top-p", 2), ("top-p", 1), ("greedy", 30)])
def test_short_and_single_responses_with_columns_of_their_own(
    policy: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, queries = lively("llama", 21, 1.0).double(), some_queries(21, 5)
    expected = ours(model, queries, policy=policy, max_new_tokens=steps)
    monkeypatch.setattr(decoding_module, "LONG", 1)
    assert ours(model, queries, policy=policy, max_new_tokens=steps) == expected


def test_the_work_of_a_slot_does_not_grow_with_the_number_of_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplications in all attention products of eight responses of 120 tokens, beside the shared columns'."""
    model, queries = lively("llama", 21, -60.0), [[5, 6, 7]]
    options: dict[str, Any] = {"num_responses": 8, "max_new_tokens": 120, "policy": "top-p"}
    monkeypatch.setattr(slot_columns, "BLOCK", 15)
    monkeypatch.setattr(cpu, "products_beat_fused", lambda dtype: True)  # products are what can be counted

    def products() -> int:
        with FlopCounterMode(display=False) as counter:
            ours(model, queries, **options)
        by_kind = counter.get_flop_counts()["Global"]
        return sum(count for kind, count in by_kind.items() if "bmm" in str(kind))

    shared = products()
    monkeypatch.setattr(decoding_module, "LONG", 120)
    assert 0 < products() < shared / 6


# --- devices on which the host waits ------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU with the kernels of a device that has none of its own."""
    monkeypatch.setitem(choice.KERNELS, "cpu", reference)


@pytest.mark.parametrize("path", ["tree", "padded"])
@pytest.mark.parametrize("policy", POLICY_CASES)
def test_responses_that_end_between_two_looks_are_the_same(
    policy: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots go on after their ends until the host looks; once it looks every step, once every 16, once never."""
    model, queries = lively("llama", 10, 1.5).double(), some_queries(10, 20)
    options = {"policy": policy, "path": path, "max_new_tokens": 25, **POLICY_CASES[policy]}
    expected = ours(model, queries, **options)
    assert len(lengths_of(expected)) >= 8
    monkeypatch.setitem(choice.KERNELS, "cpu", reference)
    for every in (1, 5, 16, 100):
        monkeypatch.setattr(reference, "STEPS_BETWEEN_CHECKS", every)
        assert ours(model, queries, **options) == expected


class Looks(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers read, and shapes that depend on them."""

    WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition("::")[2].partition(".")[0].strip("_")
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += by_mask or any(name.startswith(waiting.strip("_")) for waiting in self.WAITING)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICY_CASES)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_host_waits_at_most_once_in_a_step(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fact three times in 16 steps: for what is finite, for what has ended, and for which queries are left."""
    model, queries = lively("llama", 10, -1.0), some_queries(10, 6)
    looks = Looks()
    listed: list[int] = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (listed.append(1), plain(self))[1])
    counts: list[int] = []

    class Watched(shared_cache.SharedCache):
        def step(self, advance: Advance) -> torch.Tensor:
            counts.append(looks.count + len(listed))
            return super().step(advance)

    monkeypatch.setitem(decoding_module.STEPPERS, "tree", Watched)
    with looks:
        results = ours(model, queries, policy=policy, max_new_tokens=50, **POLICY_CASES[policy])
    assert max(lengths_of(results)) == 50 and len(counts) == 49
    waits = [after - before for before, after in itertools.pairwise(counts)]
    assert 0 < sum(waits) <= 3 * 4 and sum(wait > 0 for wait in waits) <= 2 * 4


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("policy", POLICY_CASES)
@pytest.mark.parametrize("own_columns", [False, True])
def test_shapes_stay_while_nothing_is_packed(policy: str, own_columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors of a decode step have the shapes of the one before, but for every 64th column and 16th step."""
    model, queries = lively("mistral", 10, 1.0), some_queries(10, 6)
    shapes: list[set[tuple[str, tuple[int, ...]]]] = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if shapes and isinstance(result, torch.Tensor):
                shapes[-1].add((function.name(), tuple(result.shape)))
            return result

    if own_columns:
        monkeypatch.setattr(decoding_module, "LONG", 1)
        monkeypatch.setattr(slot_columns, "BLOCK", 16)

    def watch(kind: Any) -> None:
        plain = kind.step

        def step(self: Any, advance: Advance) -> torch.Tensor:
            shapes.append(set())
            return plain(self, advance)

        monkeypatch.setattr(kind, "step", step)

    watch(shared_cache.SharedCache)
    watch(slot_columns.SlotColumns)
    width = POLICY_CASES[policy].get("num_beams", POLICY_CASES[policy].get("num_responses", 1))
    with Shapes():
        ours(model, queries, policy=policy, max_new_tokens=50, **POLICY_CASES[policy])
    changes = [after != before for before, after in itertools.pairwise(shapes[:-1])]
    assert len(changes) >= 25
    assert sum(changes) <= 2 * (len(shapes) // 16 + width * 50 // 64 + 2)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("policy", POLICY_CASES)
@pytest.mark.parametrize("path", ["tree", "padded"])
def test_outputs_that_stop_being_numbers_between_two_looks(policy: str, path: str) -> None:
    """At the third step: the draws from them must not break anything before the next look."""
    model, queries = lively("llama", 10, -50.0), some_queries(10, 3)
    calls: list[int] = []

    def damage(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output if len(calls) < 3 else output * torch.nan

    model.model.layers[1].mlp.register_forward_hook(damage)
    for steps in (8, 40):  # looked for at the end, and at the 16th step
        calls.clear()
        with pytest.raises(UserError, match="no finite numbers"):
            ours(model, queries, policy=policy, path=path, max_new_tokens=steps, **POLICY_CASES[policy])
        assert len(calls) <= 17


# --- sliding windows, other paths ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_windows_shorter_than_query_and_response(family: str) -> None:
    """Queries on both sides of the window of 8; responses grow out of it."""
    model = lively(family, 12, -50.0)
    queries = [[5], some_queries(12, 3)[2], list(range(20, 28)), list(range(30, 60))]
    if family == "gemma2":  # generate needs the eager attention for its soft caps
        model.set_attn_implementation("eager")
    assert usable_path(model) == "tree"
    expected = by_generate(model, queries, max_new_tokens=24)
    assert lengths_of(expected) == {24}
    assert ours(model, queries, policy="greedy", max_new_tokens=24) == expected
    beams: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 16}
    assert ours(model, queries, policy="beam", **beams) == by_generate(model, queries, **beams)


@pytest.mark.parametrize("family", ["bloom", "llama", "gpt2"])
def test_the_padded_path_equals_the_references(family: str) -> None:
    model, queries = lively(family, 13, 1.5), some_queries(13, 7)
    assert ours(model, queries, path="padded", policy="greedy", max_new_tokens=14) == by_generate(
        model, queries, max_new_tokens=14
    )
    beams: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 10}
    assert ours(model, queries, path="padded", policy="beam", **beams) == by_generate(model, queries, **beams)
    if family != "bloom":  # its softmax is fp32 whatever the weights, and padding is then not a number
        model.double()
    for groups in (2, 4):
        case = {"num_beams": 4, "num_beam_groups": groups, "max_new_tokens": 8, "diversity_penalty": 1.0}
        expected = by_oracle(model, queries, **for_oracle(case))
        assert ours(model, queries, path="padded", policy="diverse-beam", **case) == expected


def test_the_padded_path_makes_logits_for_the_last_position_alone() -> None:
    model, queries = lively("llama", 13, 1.5), some_queries(13, 7)
    positions: list[int] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].shape[1]))
    ours(model, queries, path="padded", policy="greedy", max_new_tokens=3)
    assert positions == [1, 1, 1]


def test_the_padded_path_of_an_adapter_equals_that_of_its_model() -> None:
    """PEFT's wrapper takes any keywords; positions must reach the model in it."""
    peft = pytest.importorskip("peft")
    model, queries = lively("gpt2", 13, 1.5), some_queries(13, 7)
    expected = ours(model, queries, path="padded", policy="greedy", max_new_tokens=8)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    assert ours(wrapped, queries, path="padded", policy="greedy", max_new_tokens=8) == expected


@pytest.mark.parametrize("policy", POLICY_CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_paths_give_the_same_responses(policy: str, family: str) -> None:
    model, queries = lively(family, 14, 1.5).double(), some_queries(14, 6)
    options = {"policy": policy, "max_new_tokens": 12, **POLICY_CASES[policy]}
    assert ours(model, queries, path="padded", **options) == ours(model, queries, path="tree", **options)


# --- small and strange --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["tree", "padded"])
@pytest.mark.parametrize("policy", POLICY_CASES)
def test_one_new_token(policy: str, path: str) -> None:
    model, queries = lively("llama", 15, 3.0).double(), some_queries(15, 8)
    results = ours(model, queries, path=path, policy=policy, max_new_tokens=1, **POLICY_CASES[policy])
    responses = [response for responses in results for response in responses]
    assert {(len(response.tokens), response.finish) for response in responses} == {(0, "stop"), (1, "length")}


@pytest.mark.parametrize("policy", ["greedy", "beam"])
def test_one_new_token_equals_generate(policy: str) -> None:
    model, queries = lively("llama", 15, 3.0), some_queries(15, 8)
    options: dict[str, Any] = {"max_new_tokens": 1, **POLICY_CASES[policy]}
    assert ours(model, queries, policy=policy, **options) == by_generate(model, queries, **options)


@pytest.mark.parametrize("policy", POLICY_CASES)
def test_the_end_token_first_is_an_empty_response(policy: str) -> None:
    model, queries = lively("llama", 16, 60.0), some_queries(16, 4)
    results = ours(model, queries, policy=policy, max_new_tokens=9, early_stopping=True, **POLICY_CASES[policy])
    assert all(responses[0] == Response([], "stop") for responses in results)


def test_each_query_has_its_own_end_tokens() -> None:
    """In one batch, what ends one query's response is an ordinary token in another's."""
    model, queries = lively("llama", 17, 2.0).double(), some_queries(17, 6)
    ends = [{3}, {11, 40}, {3, 11, 40}, {3}, {40}, {11, 3}]
    for policy, path in (("greedy", "tree"), ("beam", "tree"), ("diverse-beam", "padded")):
        settings = SamplingSettings(policy=policy, max_new_tokens=12)
        together = decode(
            model, queries, POLICIES[policy](settings, list("abcdef"), ends, None, torch.device("cpu")), 12, path
        )
        alone = [ours(model, [q], sorted(e), path, policy=policy, max_new_tokens=12)[0] for q, e in zip(queries, ends)]
        assert together == alone


@pytest.mark.parametrize("policy", ["greedy", "top-k", "top-p", "beam", "diverse-beam"])
@pytest.mark.parametrize("place", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("path", ["tree", "padded"])
def test_outputs_that_are_no_numbers_end_in_an_error(policy: str, place: str, path: str) -> None:
    model = tiny_model("llama")
    width = {"num_responses": 2} if policy in ("top-k", "top-p") else {}
    beams = {"num_beams": 2} if "beam" in policy else {}
    sampler = Sampler(model, tiny_tokenizer(), SamplingSettings(policy=policy, max_new_tokens=4, **width, **beams))
    sampler.path = path
    with torch.no_grad():
        model.get_parameter(place)[3, 2] = torch.nan
    with pytest.raises(UserError, match="no finite numbers"):
        sampler.draw([[1, 2, 3]], ["a"], [set()])


def test_keys_that_lie_for_products_give_the_fused_kernels_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bfloat16 does on a CPU, run in fp64 with queries that finish early, buffers packed anew and many blocks."""
    monkeypatch.setattr(blocked_cache, "BLOCK", 7)  # two steps of three slots
    model = in_fp64(lively("llama"))
    queries = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
    ends = [set(range(20)), set(), set(range(40)), {96}]
    found = {}
    for plain in (False, True):
        monkeypatch.setattr(cpu, "products_beat_fused", lambda dtype, plain=plain: plain)
        for policy in ("top-p", "beam"):
            width = {"num_responses": 3} if policy == "top-p" else {"num_beams": 3}
            sampler = Sampler(model, tiny_tokenizer(), SamplingSettings(policy=policy, max_new_tokens=12, **width))
            found[plain, policy] = sampler.draw(queries, list("abcd"), ends)
    assert found[True, "top-p"] == found[False, "top-p"]
    assert found[True, "beam"] == found[False, "beam"]


@pytest.mark.parametrize("vocabulary", [97, 4096, 49152])
def test_the_best_tokens_are_found_in_blocks(vocabulary: int) -> None:
    scores = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    scores[0, :12] = torch.arange(12) + 50.0  # all of the best in one block
    scores[1, ::300] = scores[1, ::300] + 60.0  # and each in one of its own
    scores[2, 5:] = -torch.inf
    values, tokens = logits.top(scores, 12)
    expected = torch.topk(scores, 12)
    assert torch.equal(values, expected.values)
    assert torch.equal(scores.gather(1, tokens), values)
    assert all(len(set(row)) == 12 for row in tokens.tolist())


@pytest.mark.parametrize("kernels", [cpu, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "count"), [(97, 12), (97, 97), (512, 1), (8192, 5), (49152, 50)])
def test_of_equal_scores_the_first_are_best(kernels: Any, dtype: torch.dtype, vocabulary: int, count: int) -> None:
    """Against sorting by (−score, column), with few different scores and both zeros."""
    generator = torch.Generator().manual_seed(vocabulary)
    scores = torch.randint(-2, 3, (6, vocabulary), generator=generator).to(dtype)
    scores[1] = torch.where(torch.rand(vocabulary, generator=generator) < 0.5, -0.0, 0.0).to(dtype)
    scores[2, 3:] = -torch.inf
    scores[3] = torch.randn(vocabulary, generator=generator).to(dtype)
    scores[4] = 7.0
    values, columns = kernels.top(scores, count)
    for row, best in zip(scores.tolist(), columns.tolist(), strict=True):
        assert best == sorted(range(vocabulary), key=lambda column: (-row[column], column))[:count]
    assert torch.equal(values, scores.gather(1, columns))


@pytest.mark.parametrize("policy", ["top-p", "beam"])
def test_weights_laid_out_for_a_batch_give_the_same_responses(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN, and lays nothing out")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    model, queries = lively("llama", bias=1.0), some_queries(3, 12)
    options: dict[str, Any] = {"num_responses": 3} if policy == "top-p" else {"num_beams": 3}
    laid_out: list[int] = []
    laying = products.packed

    @contextlib.contextmanager
    def counted(model: Any, rows: int) -> Iterator[None]:
        with laying(model, rows):
            laid_out.append(sum(map(products.is_packed, model.parameters())))
            yield

    monkeypatch.setattr(products, "packed", counted)
    expected = ours(model, queries, policy=policy, max_new_tokens=31, **options)
    assert not laid_out
    assert ours(model, queries, policy=policy, max_new_tokens=32, **options) != [] and laid_out[0] > 10
    monkeypatch.setattr(cpu, "PACK_STEPS", 1)
    assert ours(model, queries, policy=policy, max_new_tokens=31, **options) == expected
    assert len(laid_out) == 2 and not any(map(products.is_packed, model.parameters()))
