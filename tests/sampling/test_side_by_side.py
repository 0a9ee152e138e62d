"""A batch in lanes, each by threads of its own: the same responses, and nothing left behind where a lane fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rrhf.models.kernels.cpu import device as cpu
from rrhf.models.kernels.cpu import products
from rrhf.sampling.decoding import decode
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.side_by_side import lanes_of, side_by_side
from support.models import tiny_model, tiny_tokenizer

QUERIES = [[5 + i, *range(7, 7 + 3 * (i % 4))] for i in range(7)]


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu, "LANE_ROWS", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", vocabulary=300).eval()  # type: ignore[no-any-return]


def drawn(sampler: Sampler) -> list[list[Any]]:
    ends = [{int(token) for token in range(20 + i)} for i in range(len(QUERIES))]  # of its own for every query
    return sampler.draw(QUERIES, [f"key {i}" for i in range(len(QUERIES))], ends)


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("policy", ["greedy", "top-p", "beam", "diverse-beam"])
def test_lanes_give_the_responses_of_the_whole_batch(
    policy: str, laid_out: bool, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if laid_out:
        monkeypatch.setattr(products, "onednn_is_faster", torch.backends.mkldnn.is_available)
        monkeypatch.setattr(cpu, "PACK_ROWS", 1)
        monkeypatch.setattr(cpu, "PACK_STEPS", 1)
    seen: dict[int, set[int]] = {}  # thread → how many threads it has for itself
    cut: list[int] = []  # into how many lanes batches were cut; one that is done early leaves its thread to another

    def counted(work: Any, count: int, lanes: int) -> Any:
        cut.append(lanes)
        return side_by_side(work, count, lanes)

    monkeypatch.setattr("rrhf.sampling.side_by_side.side_by_side", counted)
    sampler = Sampler(model, tiny_tokenizer(), SamplingSettings(policy=policy, max_new_tokens=12))
    forward = model.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.setdefault(threading.get_ident(), set()).add(torch.get_num_threads())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", watched)
    lanes = drawn(sampler)
    width = 1 if policy == "greedy" else 4
    wanted = min(3, 7 * width // 4)
    assert cut == [wanted] * (wanted > 1) and set.union(*seen.values()) == {3 // wanted}
    assert len(seen) <= wanted and (threading.get_ident() in seen) == (wanted == 1)
    seen.clear()
    monkeypatch.setattr(cpu, "LANE_ROWS", 1000)
    assert drawn(sampler) == lanes
    assert set(seen) == {threading.get_ident()}
    assert not any("forward" in vars(module) for module in model.modules() if module is not model.model)
    assert not any(map(products.is_packed, model.parameters()))
    assert len({len(response.tokens) for responses in lanes for response in responses}) > 1  # some end before others


def test_models_that_lanes_would_disturb_are_decoded_whole(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lanes_of(model, 7, 4) == 3
    assert lanes_of(model, 2, 4) == 2
    assert lanes_of(model, 7, 1) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert lanes_of(model, 7, 4) == 1
    rotary = model.model.rotary_emb
    for kind, lanes in [
        ("dynamic", 1),
        ("longrope", 1),
        ({"full_attention": "default", "sliding_attention": "longrope"}, 1),
        ({"full_attention": "default"}, 3),
        ("yarn", 3),
    ]:
        monkeypatch.setattr(rotary, "rope_type", kind)
        assert lanes_of(model, 7, 4) == lanes
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert lanes_of(model, 7, 4) == 1


def test_a_lane_that_fails_ends_the_others_and_is_what_is_raised() -> None:
    ended: list[int] = []

    def work(share: Sequence[int], given_up: threading.Event) -> list[int]:
        if share[0] == 1:
            raise MemoryError("of lane 1")
        assert given_up.wait(60)
        ended.append(share[0])
        return list(share)

    with pytest.raises(MemoryError, match="of lane 1"):
        side_by_side(work, 7, 3)
    assert sorted(ended) == [0, 2]


def test_a_stopped_program_does_not_wait_for_all_tokens(model: PreTrainedModel) -> None:
    settings = SamplingSettings(policy="top-p", max_new_tokens=1000)
    given_up = threading.Event()
    steps: list[int] = []
    policy = settings.how(settings, ["a", "b"], [set(), set()], None, torch.device("cpu"))
    advance = policy.advance

    def counted(logits: Any, slots: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            given_up.set()
        return advance(logits, slots)

    policy.advance = counted
    decode(model, QUERIES[:2], policy, 1000, given_up=given_up)
    assert len(steps) == 3


def test_results_come_in_the_order_of_the_numbers() -> None:
    assert side_by_side(lambda share, _: [10 * number for number in share], 8, 3) == list(range(0, 80, 10))
    assert torch.get_num_threads() == 3
