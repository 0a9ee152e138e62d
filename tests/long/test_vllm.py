"""vLLM on SmolLM2 and dialogues of HH: what is reproducible, and greedy responses against the model's own.

Runs with ``make test-engines``, on a CPU; minutes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rrhf.models.tokenization import TextSettings
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.engine import EngineModel
from rrhf.sampling.sources.vllm import VLLM
from support.engines import answers, differences, first_gap, hh_records, local_answers
from support.models import SMOLLM2

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
    pytest.mark.skipif(os.environ.get("RRHF_LONG") != "1", reason="takes minutes: set RRHF_LONG=1"),
]

PROMPTS = int(os.environ.get("RRHF_LONG_PROMPTS", "40"))
TEXT = TextSettings(max_query_length=64)


def sampling(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{"policy": "top-p", "num_responses": 4, "max_new_tokens": 32, **changes})


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLM]:
    started = pytest.MonkeyPatch()
    started.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    loaded = VLLM(SMOLLM2, sampling(), TEXT, "float32")
    yield loaded
    loaded.close()
    started.undo()


def test_the_same_draws_again_and_in_another_order(engine: VLLM, test_data: Path) -> None:
    records = hh_records(test_data, PROMPTS)
    source = EngineModel(engine, "t", {})
    drawn = answers(source, records)
    assert answers(source, records) == drawn
    moved = differences(drawn, answers(source, records[::-1]))
    print(f"{moved} of {4 * PROMPTS} responses differ in the reverse order")
    assert moved <= 0.02 * 4 * PROMPTS  # products of other shapes round otherwise, and a draw may lie at the boundary


def test_greedy_responses_are_the_models_own(engine: VLLM, test_data: Path, smollm2: tuple[Any, Any]) -> None:
    """Where they part, the two tokens are as likely to within rounding."""
    records = hh_records(test_data, PROMPTS)
    greedy = sampling(policy="greedy", num_responses=1)
    other = VLLM(SMOLLM2, greedy, TEXT, "float32")
    other.llm = engine.llm
    theirs, ours = answers(EngineModel(other, "t", {}), records), local_answers(smollm2, greedy, TEXT, records)
    gaps = {r.id: first_gap(smollm2, TEXT, r, ours, theirs) for r in records if ours[r.id] != theirs[r.id]}
    print(f"{len(gaps)} of {PROMPTS} greedy responses differ, at gaps of {gaps}")
    assert all(gap < 1e-3 for gap in gaps.values())
