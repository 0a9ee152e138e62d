"""vLLM as a source. What needs the engine runs with ``make test-engines``, on the CPU."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.engine import EngineModel
from rrhf.sampling.sources.local import LocalModel
from rrhf.sampling.sources.parsing import parse_source
from rrhf.sampling.sources.vllm import VLLM
from support.engines import answers, differences, river_records, write_engine_model

INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed here: make test-engines")

BUDGET = 256  # tokens a step: fewer than the prompts have, so that vLLM would cut one of them


def test_the_model_may_be_written_like_a_local_one() -> None:
    source = parse_source("vllm:package:carrier/model.gguf@top-k:3")
    assert (source.kind, source.name, source.tag) == ("vllm", "package:carrier/model.gguf", "model@top-k")


def test_beams_are_refused() -> None:
    for policy in ("beam", "diverse-beam"):
        with pytest.raises(UserError, match="vLLM has no diverse beam search: use top-p, top-k or greedy"):
            VLLM("anything", SamplingSettings(policy=policy))


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_without_vllm_the_cure_is_named() -> None:
    with pytest.raises(UserError, match=r"pip install 'rrhf\[vllm\]'"):
        VLLM("anything")


# --- with the engine ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_engine_model(tmp_path_factory.mktemp("vllm") / "model"))


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[VLLM]:
    if not INSTALLED:
        pytest.skip("vLLM is not installed here: make test-engines")
    started = pytest.MonkeyPatch()
    started.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    loaded = VLLM(model, sampling(), None, "float32", enforce_eager=True, max_num_batched_tokens=BUDGET)
    yield loaded
    loaded.close()
    started.undo()


def sampling(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{"policy": "top-p", "num_responses": 4, "max_new_tokens": 8, "seed": 3, **changes})


def source(engine: VLLM, tag: str = "t", text: TextSettings | None = None, **changes: Any) -> EngineModel:
    """A source with settings of its own on the engine that runs already."""
    if engine.llm is None:
        engine._load()
    other = VLLM(engine.model, sampling(**changes), text, "float32")
    other.llm = engine.llm
    return EngineModel(other, tag, {})


@needs_vllm
def test_responses_depend_on_seed_record_and_number_alone(engine: VLLM) -> None:
    """Through prompts that together exceed a step's budget: with parts of prompts vLLM dies of a CPU's generators."""
    records = river_records(24)
    drawn = answers(source(engine), records)
    assert len({text for responses in drawn.values() for text, _ in responses}) > 90  # of 96
    assert answers(source(engine), records) == drawn
    assert differences(drawn, answers(source(engine), records[::-1])) == 0
    assert differences(drawn, {k: v for r in records[:3] for k, v in answers(source(engine), [r]).items()}) == 0
    first_two = answers(source(engine, num_responses=2), records)
    assert all(first_two[key] == drawn[key][:2] for key in drawn)
    assert differences(drawn, answers(source(engine, seed=4), records)) > 90


@needs_vllm
def test_greedy_and_a_cut_nucleus_are_those_of_the_model_itself(engine: VLLM, model: str) -> None:
    records = river_records(8)
    greedy = sampling(policy="greedy", num_responses=1)
    local = LocalModel(ModelSettings(model, "cpu", "float32"), greedy, TextSettings(), "l", PolicyCache())
    expected = answers(local, records)
    assert answers(source(engine, policy="greedy", num_responses=1), records) == expected
    # A nucleus, and a k, of the likeliest token alone leave nothing to draw.
    for narrow in ({"policy": "top-p", "top_p": 1e-6}, {"policy": "top-k", "top_k": 1}):
        drawn = answers(source(engine, num_responses=2, **narrow), records)
        assert all(drawn[key] == expected[key] * 2 for key in expected)


@needs_vllm
def test_stop_strings_and_the_length_of_queries(engine: VLLM) -> None:
    records = river_records(8)
    whole = answers(source(engine, policy="greedy", num_responses=1), records)
    mark = whole["q0"][0][0][2:4]
    cut = answers(source(engine, policy="greedy", num_responses=1, stop=[mark]), records)
    assert cut["q0"] == [(whole["q0"][0][0].partition(mark)[0], "stop")]
    counts: Counter[str] = Counter()
    short = source(engine, text=TextSettings(max_query_length=6))
    assert len(list(short.answer(records, counts))) == 8
    assert counts["queries were cut to --max_query_length 6 (t)"] == 8


@needs_vllm
def test_close_ends_the_engine_and_the_next_query_starts_it_again(engine: VLLM) -> None:
    import psutil

    def engines() -> list[int]:
        children = psutil.Process().children(recursive=True)
        return [child.pid for child in children if child.is_running() and child.memory_info().rss > 100 * 2**20]

    records = river_records(4)
    before = answers(EngineModel(engine, "t", {}), records)
    assert engines()
    engine.close()
    assert engine.llm is None and not engines()
    engine.close()  # nothing is left to close
    assert answers(EngineModel(engine, "t", {}), records) == before


@needs_vllm
def test_what_vllm_cannot_load_is_the_users_to_mend(model: str) -> None:
    with pytest.raises(UserError, match=r"vLLM cannot load .*model: "):
        VLLM(model, sampling(), None, "float32", max_model_len=100_000)._load()
