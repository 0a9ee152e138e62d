"""Draws against exact distributions, and ``sample`` on records with a tokenizer of characters."""

from __future__ import annotations

import dataclasses
import string
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rrhf.common.errors import UserError
from rrhf.models.kernels import reference
from rrhf.models.kernels.cpu.logits import NUCLEUS
from rrhf.models.tokenization import TextSettings
from rrhf.records.record import DRAWN_TOKENS, Record
from rrhf.sampling import batch_size
from rrhf.sampling.decoding import Response
from rrhf.sampling.policies import PART, Draws, draw, uniforms
from rrhf.sampling.sampler import Sampler, sample
from rrhf.sampling.settings import POLICIES, SamplingPolicy, SamplingSettings
from support.models import tiny_model, tiny_tokenizer

DRAWS = 50_000


# --- the distribution of draws ------------------------------------------------------------------------------------


def exact(logits: np.ndarray, top_k: int | None = None, top_p: float = 1.0) -> np.ndarray:
    """The distribution in words: keep the k likeliest; of those the fewest whose probability reaches p; rescale."""
    probabilities = np.exp(logits - logits.max())
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    total = sum(probabilities[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p * total:
            break
        kept.append(token)
        mass += probabilities[token]
    result = np.zeros(len(logits))
    result[kept] = probabilities[kept] / mass
    return result


def many_uniforms(count: int, seed: int = 0) -> torch.Tensor:
    """Uniforms as decoding takes them: 25 steps of each response's own stream."""
    streams = [uniforms(seed, str(i // 4), i % 4, 25) for i in range(count // 25)]
    return torch.from_numpy(np.concatenate(streams))


def assert_distribution(tokens: torch.Tensor, expected: np.ndarray) -> None:
    """χ² over tokens expected at least 5 times, the rarer ones as one class; nothing impossible may occur."""
    counts = np.bincount(tokens.numpy(), minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    often = expected * len(tokens) >= 5
    rare = (expected > 0) & ~often
    observed, wanted = list(counts[often]), list(expected[often] * len(tokens))
    if rare.any():
        observed.append(counts[rare].sum())
        wanted.append(expected[rare].sum() * len(tokens))
    assert len(observed) == 1 or chisquare(observed, wanted).pvalue > 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (7, 1.0), (None, 0.8), (12, 0.9), (1, 1.0), (None, 0.01)])
def test_draws_have_the_exact_distribution(top_k: int | None, top_p: float, temperature: float) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5 / temperature
    tokens = draw(logits.expand(DRAWS, -1), many_uniforms(DRAWS), top_k, top_p)
    assert_distribution(tokens, exact(logits.double().numpy(), top_k, top_p))


@pytest.mark.parametrize("vocabulary", [PART - 1, PART, PART + 1, 2 * PART])
def test_draws_over_the_bounds_of_blocks(vocabulary: int) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(2))
    tokens = torch.cat(
        [draw(logits.expand(len(part), -1), part, None, 1.0) for part in many_uniforms(DRAWS).split(2500)]
    )
    assert_distribution(tokens, exact(logits.double().numpy()))


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_draws_where_the_nucleus_is_larger_than_looked_for_at_first(top_p: float) -> None:
    """3,000 tokens of like probability: 0.9 of it is not within the 1,024 likeliest."""
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(3)) * 0.1
    expected = exact(logits.double().numpy(), None, top_p)
    assert ((expected > 0).sum() > NUCLEUS) == (top_p >= 0.9)
    tokens = torch.cat(
        [draw(logits.expand(len(part), -1), part, None, top_p) for part in many_uniforms(20_000).split(500)]
    )
    assert_distribution(tokens, expected)


def test_rows_of_one_call_have_their_own_nuclei() -> None:
    """A row that needs the whole vocabulary sorted, beside one that does not."""
    flat, sharp = torch.zeros(2000), torch.zeros(2000)
    sharp[1234] = 30.0
    uniform = many_uniforms(1000)
    tokens = draw(torch.stack([flat, sharp]).repeat(500, 1), uniform, None, 0.95)
    assert set(tokens[1::2].tolist()) == {1234}
    assert len(set(tokens[::2].tolist())) > 300
    assert tokens[1::2].tolist() == draw(sharp.expand(500, -1), uniform[1::2], None, 0.95).tolist()


ALMOST_ONE = 1.0 - 2.0**-53


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (5, 1.0), (None, 0.999), (5, 0.7), (600, 1.0)])
@pytest.mark.parametrize("vocabulary", [10, PART, 3 * PART + 1])
def test_what_has_no_probability_is_never_drawn(vocabulary: int, top_k: int | None, top_p: float) -> None:
    """At both ends of the uniforms, with tokens of probability 0 in front, behind, in whole blocks, by underflow."""
    for nothing in (float("-inf"), -500.0):
        for possible in ([vocabulary // 2], [1, vocabulary - 2], [0, vocabulary - 1]):
            logits = torch.full((2, vocabulary), nothing)
            logits[:, possible] = torch.tensor([0.3, 0.1][: len(possible)])
            tokens = draw(logits, torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64), top_k, top_p)
            assert set(tokens.tolist()) <= set(possible)
            assert len(set(tokens.tolist())) == (1 if top_p == 0.7 and len(possible) == 1 else len(possible))


def test_the_first_and_last_uniform_draw_the_first_and_last_token() -> None:
    for vocabulary in (10, PART, PART + 1, 1000):
        logits = torch.zeros(2, vocabulary)
        tokens = draw(logits, torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64), None, 1.0)
        assert tokens.tolist() == [0, vocabulary - 1]


def test_uniforms_at_the_bounds_of_blocks() -> None:
    """A block's probabilities summed in another order may miss its bound by a rounding: no impossible token comes."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        logits = torch.randn(4 * PART, generator=generator) * 8
        logits.view(4, PART)[:, -5:] = float("-inf")  # what stands last in every block
        mass = torch.exp(logits - logits.max()).double().view(4, PART).sum(dim=1).cumsum(dim=0)
        bounds = mass[:-1] / mass[-1]
        steps = [step * scale for scale in (2.0**-53, 2.0**-22) for step in range(-8, 9)]  # fp64's and fp32's roundings
        uniform = torch.cat([bounds * (1 + step) for step in steps])
        tokens = draw(logits.expand(len(uniform), -1), uniform, None, 1.0)
        assert torch.isfinite(logits[tokens]).all()
        assert set((tokens // PART).tolist()) == {0, 1, 2, 3}


def test_streams_of_uniforms_depend_on_seed_record_and_response_alone() -> None:
    base = uniforms(0, "a", 0, 50)
    assert base.dtype == np.float64
    assert ((base >= 0) & (base < 1)).all()
    assert (uniforms(0, "a", 0, 20) == base[:20]).all()  # a longer response begins like a shorter one
    for other in (uniforms(1, "a", 0, 50), uniforms(0, "b", 0, 50), uniforms(0, "a", 1, 50), uniforms(-1, "a", 0, 50)):
        assert not np.isin(other, base).any()


class Made(TorchDispatchMode):
    """Collects the devices and types of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.kinds.add((x.device.type, x.dtype))
        return result


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (7, 1.0), (None, 0.8), (12, 0.9)])
@pytest.mark.parametrize("lacks", [True, False])
def test_fp64_is_made_on_the_cpu_where_a_device_has_none(
    lacks: bool, top_k: int | None, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device of no numbers, as far as shapes, types and places go."""
    monkeypatch.setattr(reference, "WITHOUT_FP64", {"meta"} if lacks else set())
    settings = SamplingSettings(max_new_tokens=3, num_responses=3, top_k=top_k, top_p=top_p, temperature=0.5)
    with FakeTensorMode(allow_non_fake_inputs=True), Made() as made:
        draws = POLICIES["top-p"](settings, ["a"], [set()], None, torch.device("meta"))
        logits = torch.zeros(3, 2 * PART + 1, device="meta")
        tokens = draws._choose(logits, torch.arange(3, device="meta"))
    assert tokens.shape == (3,) and tokens.device.type == "meta"
    assert {device for device, dtype in made.kinds if dtype == torch.float64} == ({"cpu"} if lacks else {"cpu", "meta"})


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (5, 0.5), (None, 0.4), (None, 0.999)])
def test_of_equal_tokens_the_first_are_kept(top_k: int | None, top_p: float) -> None:
    """Logits of few values, as bfloat16 has them: the cut goes through equal ones in every row."""
    logits = torch.randint(0, 3, (40, 3000), generator=torch.Generator().manual_seed(6)).float()
    for row in logits:
        tokens = draw(row.expand(400, -1), many_uniforms(400), top_k, top_p)
        kept = exact(row.double().numpy(), top_k, top_p) > 0  # sorted() keeps the order of equals
        assert kept[tokens.numpy()].all()


def test_beams_of_equal_candidates_take_the_first_tokens() -> None:
    """Two groups of two beams; a penalty of 1 makes the second group's best token equal to others."""
    settings = SamplingSettings(policy="diverse-beam", num_beams=4, num_beam_groups=2, max_new_tokens=3)
    policy = POLICIES["diverse-beam"](settings, ["a"], [set()], None, torch.device("cpu"))
    logits = torch.zeros(1, 600)
    logits[0, [500, 20, 300]] = 1.0
    advance = policy.advance(logits, torch.arange(1))
    # Group 1: 20 and 300, the first of three. Group 2: 500, which nobody took, then the first of all others.
    assert advance.tokens.tolist() == [20, 300, 500, 0]


def test_greedy_takes_the_first_of_equal_tokens() -> None:
    logits = torch.zeros(3, 512)
    logits[0, [7, 400]] = logits[1, [300, 301]] = 5.0
    policy = POLICIES["greedy"](
        SamplingSettings(policy="greedy", max_new_tokens=2), list("abc"), [set()] * 3, None, torch.device("cpu")
    )
    assert policy.advance(logits, torch.arange(3)).tokens.tolist() == [7, 300, 0]


# --- records ------------------------------------------------------------------------------------------------------

CHARACTERS = string.ascii_letters + string.digits + " .,!?'-:;()<>@#&*+=/é"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def character_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    """One token a character, then ``<|eos|>`` (ends plain text) and ``<|end|>`` (ends a turn)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: number for number, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<|unk|>": len(vocabulary)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|eos|>", unk_token="<|unk|>", additional_special_tokens=["<|end|>"]
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return character_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random model whose responses end now and then, and that draws no unknown characters."""
    model = tiny_model("llama", len(tokenizer))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.3)
        head = torch.nn.Linear(32, len(tokenizer))
        head.weight.normal_(0.0, 0.3)
        head.bias.zero_()
        head.bias[[tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]] = -100.0
        head.bias[tokenizer.eos_token_id] = 2.5
    model.set_output_embeddings(head)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval()


QUERIES = ["Hello", "A", "What is this thing there?", "one two three", "B", "The end of it all, said he", "x" * 40]


def some_records() -> list[Record]:
    return [Record(query=query) for query in QUERIES]


SETTINGS: dict[str, SamplingSettings] = {
    "greedy": SamplingSettings(policy="greedy", max_new_tokens=20),
    "top-p": SamplingSettings(policy="top-p", max_new_tokens=20),
    "top-k": SamplingSettings(policy="top-k", top_k=5, num_responses=3, temperature=0.8, max_new_tokens=20),
    "beam": SamplingSettings(policy="beam", max_new_tokens=12),
    "diverse-beam": SamplingSettings(policy="diverse-beam", num_responses=2, max_new_tokens=12),
}


def texts(records: list[Record]) -> list[list[str]]:
    return [record.responses for record in records]


@pytest.mark.parametrize("policy", SETTINGS)
def test_sample_fills_records(policy: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = SETTINGS[policy]
    before = some_records()
    records = list(sample(before, model, tokenizer, settings))
    k = {"greedy": 1, "top-p": 4, "top-k": 3, "beam": 4, "diverse-beam": 2}[policy]
    assert [record.query for record in records] == QUERIES
    assert [record.id for record in records] == [record.id for record in before]
    for record in records:
        assert record.sources == [f"{policy}/{i}" for i in range(k)]
        assert len(record.responses) == len(record.finish) == k
        assert record.scores == []
        for response, finish in zip(record.responses, record.finish):
            assert "<|" not in response
            if finish == "length":
                assert len(response) == settings.max_new_tokens
            else:
                assert finish == "stop" and len(response) < settings.max_new_tokens
    assert {finish for record in records for finish in record.finish} == {"stop", "length"}
    assert all(record.responses == [] for record in before)  # what was given is not changed


@pytest.mark.parametrize("policy", SETTINGS)
def test_the_batch_size_changes_nothing(
    policy: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = texts(list(sample(some_records(), model, tokenizer, SETTINGS[policy])))
    for size in (1, 2, 3):  # and blocks of 4, 8 and 12 records
        settings = dataclasses.replace(SETTINGS[policy], batch_size=size)
        assert texts(list(sample(some_records(), model, tokenizer, settings))) == whole
    backwards = texts(list(sample(some_records()[::-1], model, tokenizer, SETTINGS[policy])))
    assert backwards[::-1] == whole


@pytest.mark.parametrize(("free", "fitting"), [(None, 64), (10**12, 64), (20.5, 8), (1.9, 1), (0, 1)])
def test_the_batch_size_by_default_is_what_fits_into_half_of_the_free_memory(
    free: float | None,
    fitting: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = SamplingSettings(policy="top-p", num_responses=2, max_new_tokens=20)
    records = [Record(query=f"{i % 7} things", id=str(i)) for i in range(70)]
    expected = texts(list(sample(records, model, tokenizer, dataclasses.replace(settings, batch_size=32))))
    size = batch_size.query_bytes(model, settings, longest=len("1 things"))
    # Two layers of two heads of eight numbers, keys and values, in fp32; the logits of both responses beside them.
    assert size == 2 * 2 * 2 * 8 * 4 * (8 + 2 * 19) + batch_size.LOGIT_BYTES * 2 * len(tokenizer)
    monkeypatch.setattr(batch_size, "free_memory", lambda device: None if free is None else int(free * size))
    batches: list[int] = []
    draw_batch = Sampler.draw

    def counted(self: Sampler, queries: Any, *rest: Any) -> Any:
        batches.append(len(queries))
        return draw_batch(self, queries, *rest)

    monkeypatch.setattr(Sampler, "draw", counted)
    with caplog.at_level("INFO", logger="rrhf"):
        assert texts(list(sample(records, model, tokenizer, settings))) == expected
    assert max(batches) == fitting
    assert [line for line in caplog.messages if f"{fitting} queries at a time" in line and "--batch_size" in line]


@pytest.mark.parametrize("stops", [None, lambda tokens: False, lambda tokens: tokens[-1:] == [8]])
def test_a_response_that_ended_by_itself_has_its_end_token_among_those_drawn(stops: Any) -> None:
    """Also beside stop strings, which end others without one."""
    settings = SamplingSettings(policy="greedy", max_new_tokens=4, stop=["…"] if stops else [])
    draws = Draws(settings, ["a", "b", "c"], [{3}] * 3, stops, torch.device("cpu"))
    slots = torch.arange(3)
    for column in ([7, 5, 5], [3, 8, 5], [0, 3, 5], [0, 0, 5]):
        slots = draws.advance(torch.nn.functional.one_hot(torch.tensor(column), 10).float()[slots], slots).slots
    ((ended,), (stopped,), (long,)) = draws.results()
    assert (ended.tokens, ended.finish, ended.drawn) == ([7], "stop", [7, 3])
    at_string = stops is not None and stops([5, 8])
    assert (stopped.tokens, stopped.finish) == ([5, 8], "stop")
    assert stopped.drawn == ([5, 8] if at_string else [5, 8, 3])
    assert (long.tokens, long.finish, long.drawn) == ([5] * 4, "length", [5] * 4)


@pytest.mark.parametrize("policy", SETTINGS)
def test_the_tokens_noted_for_training_end_with_the_end_token(
    policy: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of every policy; where one does not say what ended a response, the text's tokens are trained on, and its end."""
    sampler = Sampler(model, tokenizer, SETTINGS[policy])
    records = [record for _, record in sampler.extend(some_records(), tokens=True)]
    noted = [
        (finish, tokens)
        for record in records
        for finish, tokens in zip(record.finish, record.extra[DRAWN_TOKENS], strict=True)
    ]
    assert all((tokens[-1] == tokenizer.eos_token_id) == (finish == "stop") for finish, tokens in noted)
    assert any(finish == "stop" for finish, _ in noted)


def test_an_end_token_that_a_policy_leaves_out_is_trained_all_the_same(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(model, tokenizer, SamplingSettings(policy="greedy", stop=["."]))
    ids = tokenizer("ab").input_ids
    drawn = [Response(ids, "stop"), Response(tokenizer("ab.").input_ids, "stop"), Response(ids, "length")]
    monkeypatch.setattr(sampler, "draw", lambda queries, keys, ends: [drawn] * len(queries))
    ((_, record),) = sampler.extend([Record("Hello")], tokens=True)
    assert record.extra[DRAWN_TOKENS] == [None, drawn[1].tokens, ids]
    encoded = sampler.format.encode_record(record).responses
    assert encoded == [[*ids, tokenizer.eos_token_id], drawn[1].tokens, ids]


def test_seeds(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    def drawn(seed: int) -> list[list[str]]:
        settings = SamplingSettings(max_new_tokens=20, seed=seed)
        return texts(list(sample(some_records(), model, tokenizer, settings)))

    torch.manual_seed(1)
    first = drawn(0)
    torch.manual_seed(2)  # nor does the library's own state matter
    assert drawn(0) == first
    assert all(one != other for one, other in zip(drawn(1), first))
    assert all(len(set(responses)) > 1 for responses in first)  # responses of a query differ


def test_text_through_the_model_has_the_exact_distribution(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """50,000 draws of one token, the whole way: settings, streams of uniforms, temperature, top-k, top-p."""
    settings = SamplingSettings(
        top_k=20, top_p=0.9, temperature=0.7, num_responses=DRAWS, max_new_tokens=1, policy="top-k"
    )
    sampler = Sampler(model, tokenizer, settings)
    ids = sampler.format.encode_query("What now?")
    end = tokenizer.eos_token_id
    (responses,) = sampler.draw([ids], ["some-id"], [{end}])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double() / 0.7
    tokens = torch.tensor([(response.tokens or [end])[0] for response in responses])
    assert_distribution(tokens, exact(logits.numpy(), 20, 0.9))


def test_policies_defaults(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """``top-k`` alone draws from 50; ``top-p`` alone from all."""
    logits = torch.zeros(80)
    logits[:50] = 0.01
    drawn = {}
    for policy in ("top-k", "top-p"):
        settings = SamplingSettings(policy=policy, num_responses=2000, max_new_tokens=1)
        state = POLICIES[policy](settings, ["a"], [set()], None, torch.device("cpu"))
        state.advance(logits[None], torch.arange(1))
        drawn[policy] = {response.tokens[0] for response in state.results()[0]}
    assert drawn == {"top-k": set(range(50)), "top-p": set(range(80))}


def test_responses_come_behind_those_that_are_there(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    record = Record(
        query="Hello",
        responses=["human one", "human two"],
        sources=["human/a", "human/b"],
        finish=["stop", "length"],
        scores=[0.25, None],
        rewards={"m:f": [0.25, None], "m:g": [1.0, 2.0]},
        id="mine",
        extra={"note": 1},
    )
    (result,) = sample([record], model, tokenizer, SamplingSettings(num_responses=2, max_new_tokens=5), source="pi")
    assert result.responses[:2] == ["human one", "human two"] and len(result.responses) == 4
    assert result.sources == ["human/a", "human/b", "pi/0", "pi/1"]
    assert result.finish[:2] == ["stop", "length"]
    assert result.scores == [0.25, None, None, None]
    assert result.rewards == {"m:f": [0.25, None, None, None], "m:g": [1.0, 2.0, None, None]}
    assert (result.id, result.extra) == ("mine", {"note": 1})


def test_no_records_and_streams_without_an_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = SamplingSettings(policy="greedy", max_new_tokens=3, batch_size=2)
    assert list(sample([], model, tokenizer, settings)) == []
    taken = []

    def endless():  # type: ignore[no-untyped-def]
        while True:
            taken.append(1)
            yield Record(query="Hello", id=str(len(taken)))

    next(sample(endless(), model, tokenizer, settings))
    assert len(taken) <= 4 * settings.batch_size


def test_a_model_in_training_stays_in_training(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model("gpt2", len(tokenizer)).train()  # its dropout would change greedy text
    settings = SamplingSettings(policy="greedy", max_new_tokens=10)
    runs = [texts(list(sample(some_records(), model, tokenizer, settings))) for _ in range(2)]
    assert runs[0] == runs[1]
    assert model.training


# --- stop strings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["greedy", "top-p", "top-k"])
def test_a_stop_string_ends_a_response(policy: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The text is that without stop strings, up to the first of them, and finishes by "stop"."""
    plain = list(sample(some_records(), model, tokenizer, SETTINGS[policy]))
    stops = sorted({record.responses[0][2:4] for record in plain if len(record.responses[0]) >= 6})
    assert len(stops) >= 2
    stopped = list(sample(some_records(), model, tokenizer, dataclasses.replace(SETTINGS[policy], stop=stops)))
    cut = 0
    for before, after in zip(plain, stopped):
        for text, finish, new, new_finish in zip(before.responses, before.finish, after.responses, after.finish):
            found = [text.find(stop) for stop in stops if stop in text]
            assert new == (text[: min(found)] if found else text)
            assert new_finish == ("stop" if found else finish)
            cut += bool(found)
    assert cut >= 2


@pytest.mark.parametrize("policy", ["beam", "diverse-beam"])
def test_a_stop_string_of_one_token_ends_beams_as_an_end_token_does(
    policy: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = dataclasses.replace(SETTINGS[policy], num_responses=None)
    usual = texts(list(sample(some_records(), model, tokenizer, settings)))
    character = Counter("".join(text for responses in usual for text in responses)).most_common(1)[0][0]
    stopped = Sampler(model, tokenizer, dataclasses.replace(settings, stop=[character]))
    ended = Sampler(model, tokenizer, settings)
    queries = [ended.format.encode_query(query) for query in QUERIES]
    end = {tokenizer.eos_token_id}
    with_string = stopped.draw(queries, QUERIES, [end] * len(queries))
    with_token = ended.draw(queries, QUERIES, [end | {tokenizer.convert_tokens_to_ids(character)}] * len(queries))
    found = [[(stopped.text(r), r.finish) for r in responses] for responses in with_string]
    assert found == [[(ended.text(r), r.finish) for r in responses] for responses in with_token]
    assert any(character in ended.format.decode(r.tokens) for responses in with_string for r in responses)


def test_a_stop_string_of_many_tokens_a_character(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    """A character can be several tokens of bytes: all of them are looked at."""
    stop = "𐍈𐍉𐍆𐍅𐍄𐍃"
    sampler = Sampler(tiny_model("llama", 97), smollm2_tokenizer, SamplingSettings(stop=[stop]))
    ids = smollm2_tokenizer(f"some text {stop}").input_ids
    assert len(smollm2_tokenizer(stop).input_ids) > len(stop) + 8
    check = sampler._stop_check()
    assert check(ids)
    assert not check(ids[:-1])
    assert sampler.text(Response(ids, "stop")) == "some text "


# --- messages -----------------------------------------------------------------------------------------------------


def test_messages_go_through_the_chat_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "So"},
    ]
    settings = SamplingSettings(max_new_tokens=15, num_responses=8)
    sampler = Sampler(model, tokenizer, settings)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    rendered = tokenizer.decode(sampler.format.encode_query(messages))
    assert rendered == "<user>Hi<|end|><assistant>Yes<|end|><user>So<|end|><assistant>"
    # A turn ends with the template's token; the tokenizer's and the model's own end it, too. Plain text knows no turns.
    assert sampler.end_tokens(Record(query=messages)) == {end, tokenizer.eos_token_id}
    assert sampler.end_tokens(Record(query="Hi")) == {tokenizer.eos_token_id}
    (result,) = sample([Record(query=messages)], model, tokenizer, settings)
    (plain,) = sample([Record(query=rendered.replace("<|end|>", ""), id=result.id)], model, tokenizer, settings)
    assert result.responses != plain.responses
    (with_system,) = sample([Record(query=messages)], model, tokenizer, settings, TextSettings(system_prompt="Be so"))
    assert with_system.responses != result.responses


def test_the_templates_end_token_ends_a_response(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.bias[end] += 160.0
    try:
        (result,) = sample([Record(query=[{"role": "user", "content": "Hi"}])], model, tokenizer, SETTINGS["top-p"])
        assert (result.responses, result.finish) == ([""] * 4, ["stop"] * 4)
        (plain,) = sample([Record(query="Hi")], model, tokenizer, SETTINGS["top-p"])
        assert plain.finish == ["length"] * 4
    finally:
        with torch.no_grad():
            head.bias[end] -= 160.0


def test_messages_without_a_template(model: PreTrainedModel) -> None:
    bare = character_tokenizer(template=None)
    with pytest.raises(UserError, match="no chat template"):
        list(sample([Record(query=[{"role": "user", "content": "Hi"}])], model, bare, SETTINGS["greedy"]))
    assert len(list(sample([Record(query="Hi")], model, bare, SETTINGS["greedy"]))) == 1


def test_a_query_that_does_not_fit_the_context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model has 512 positions: 500 + 12 fit, 501 + 12 do not."""
    settings = SamplingSettings(policy="greedy", max_new_tokens=12)
    (fits,) = sample([Record(query="a" * 500)], model, tokenizer, settings)
    assert fits.finish in (["stop"], ["length"])
    with pytest.raises(UserError, match=r"501 tokens.*context of 512.*--max_query_length 500"):
        list(sample([Record(query="a" * 501)], model, tokenizer, settings))
    (cut,) = sample([Record(query="b" + "a" * 500)], model, tokenizer, settings, TextSettings(max_query_length=500))
    assert cut.responses == fits.responses  # cut from the left


# --- settings -----------------------------------------------------------------------------------------------------

FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"policy": "diverse-beams"}, "did you mean 'diverse-beam'?"),
    ({"policy": "xyz"}, "known: beam, diverse-beam, greedy, top-k, top-p"),
    ({"num_responses": 0}, "--num_responses 0: must be at least 1"),
    ({"num_responses": -2}, "--num_responses -2"),
    ({"top_k": 0}, "--top_k 0"),
    ({"max_new_tokens": 0}, "--max_new_tokens 0"),
    ({"batch_size": 0}, "--batch_size 0"),
    ({"num_beams": 0}, "--num_beams 0"),
    ({"num_beam_groups": 0}, "--num_beam_groups 0"),
    ({"top_p": 0.0}, r"--top_p 0.0: must lie in (0, 1]"),
    ({"top_p": 1.5}, "--top_p 1.5"),
    ({"top_p": -0.1}, "--top_p -0.1"),
    ({"top_p": float("nan")}, "--top_p nan"),
    ({"temperature": 0.0}, "--temperature 0.0: must be above 0 (greedy is a policy of its own)"),
    ({"temperature": -1.0}, "--temperature -1.0"),
    ({"temperature": float("nan")}, "--temperature nan"),
    ({"diversity_penalty": -0.5}, "--diversity_penalty -0.5"),
    ({"stop": ["a", ""]}, "--stop: a stop string is empty"),
    ({"policy": "diverse-beam", "num_beams": 4, "num_beam_groups": 3}, "--num_beams 4 is not divisible by"),
    ({"policy": "beam", "num_beam_groups": 2}, "--num_beam_groups 2 needs --policy diverse-beam"),
    ({"policy": "beam", "num_beams": 2, "num_responses": 3}, "--num_responses 3 is more than --num_beams 2"),
    ({"policy": "greedy", "num_responses": 2}, "greedy has one response a query"),
]


@pytest.mark.parametrize(("options", "words"), FAULTS, ids=lambda value: str(value)[:40])
def test_a_fault_in_the_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        SamplingSettings(**options)
    assert words in str(raised.value)


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(UserError) as raised:
        SamplingSettings(policy="best", num_responses=0, top_p=2.0, temperature=0.0, stop=[""], diversity_penalty=-1.0)
    message = str(raised.value)
    for name in (
        "--policy best",
        "--num_responses 0",
        "--top_p 2.0",
        "--temperature 0.0",
        "--stop",
        "--diversity_penalty",
    ):
        assert name in message
    assert len(message.splitlines()) == 6


def test_responses_by_default() -> None:
    defaults = {policy: SamplingSettings(policy=policy) for policy in SETTINGS}
    assert {policy: settings.responses for policy, settings in defaults.items()} == {
        "greedy": 1, "top-p": 4, "top-k": 4, "beam": 4, "diverse-beam": 4
    }  # fmt: skip
    assert SamplingSettings(policy="diverse-beam", num_beams=6).groups == 6  # a group a beam, as the paper has it
    assert SamplingSettings(policy="beam", num_beams=6).groups == 1


def test_special_tokens_that_a_model_draws_inside_a_response_are_in_its_text_and_come_back() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
    markers = set(tokenizer.convert_tokens_to_ids(["<|channel|>", "<|message|>", "<|im_start|>", "<s>"]))
    settings = SamplingSettings(num_responses=16, max_new_tokens=40, temperature=4.0)
    sampler = Sampler(tiny_model("llama", len(tokenizer)), tokenizer, settings)
    (responses,) = sampler.draw([sampler.format.encode_query("ab")], ["r"], [{tokenizer.eos_token_id}])
    with_markers = [response.tokens for response in responses if markers & set(response.tokens)]
    assert len(with_markers) >= 4
    for response in responses:
        text = sampler.text(response)
        again = sampler.format.encode_response("ab", text, "length")
        assert [i for i in again if i in markers] == [i for i in response.tokens if i in markers]
    assert sampler.markers_lost == 0


# --- the dict of policies -------------------------------------------------------------------------------------------


def test_every_policy_of_the_dict_is_in_the_help_and_draws(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    shown = SamplingSettings.__dataclass_fields__["policy"].metadata["help"]
    for name, policy in POLICIES.items():
        assert f"{name}: {policy.description}" in shown
        settings = SamplingSettings(policy=name, max_new_tokens=4)
        (record,) = sample(some_records()[:1], model, tokenizer, settings)
        assert len(record.responses) == settings.responses
        assert record.sources == [f"{name}/{i}" for i in range(settings.responses)]


def test_a_new_policy_is_a_function_and_a_line(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the dict, or outside as pkg.module:function: here one that draws the likeliest token of half of them."""
    (tmp_path / "halves.py").write_text(HALVES)
    monkeypatch.syspath_prepend(tmp_path)
    outside = SamplingSettings(policy="halves:make", max_new_tokens=6)
    drawn = texts(list(sample(some_records(), model, tokenizer, outside)))
    greedy = texts(list(sample(some_records(), model, tokenizer, SamplingSettings(policy="greedy", max_new_tokens=6))))
    assert drawn != greedy and all(len(set(responses)) == 1 and len(responses) == 4 for responses in drawn)
    with pytest.raises(UserError, match="--policy halves: "):
        SamplingSettings(policy="halves")
    line = SamplingPolicy("halves:make", "the likeliest token of half of them", default_responses=2)
    monkeypatch.setitem(POLICIES, "halves", line)
    inside = texts(list(sample(some_records(), model, tokenizer, SamplingSettings(policy="halves", max_new_tokens=6))))
    assert inside == [responses[:2] for responses in drawn]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"--policy failing:fails failed: ZeroDivisionError: .*in fails"),
        ("nothing", "--policy failing:nothing gave NoneType, which has no width, advance, results: it must make a"),
        ("late", r"--policy failing:late failed: ZeroDivisionError: .*in _choose"),
    ],
)
def test_an_own_policy_that_fails_is_named(
    name: str,
    message: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    settings = SamplingSettings(policy=f"failing:{name}", max_new_tokens=6)
    with pytest.raises(UserError, match=message):
        list(sample(some_records(), model, tokenizer, settings))


FAILING = """
from rrhf.sampling.policies import Draws

class Late(Draws):
    def _choose(self, logits, slots):
        return 1 / 0

def late(*arguments):
    return Late(*arguments)

def fails(*arguments):
    return 1 / 0

def nothing(*arguments):
    pass
"""

HALVES = """
from rrhf.sampling.policies import Draws

class Halves(Draws):
    def _choose(self, logits, slots):
        return logits[:, : logits.shape[-1] // 2].argmax(dim=-1)

def make(*arguments):
    return Halves(*arguments)
"""
