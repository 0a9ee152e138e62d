"""OpenVINO on SmolLM2 and dialogues of HH: what is reproducible, and greedy and beams against the model's own.

Runs with ``make test-engines``; minutes.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from rrhf.models.tokenization import TextSettings
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.engine import EngineModel
from rrhf.sampling.sources.openvino import OpenVINO
from support.engines import (
    CAN_CONVERT,
    answers,
    convert_for_openvino,
    differences,
    first_gap,
    hh_records,
    local_answers,
)
from support.models import smollm2_folder

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("openvino_genai") is None or not CAN_CONVERT,
        reason="OpenVINO GenAI and optimum-intel are not installed here",
    ),
    pytest.mark.skipif(os.environ.get("RRHF_LONG") != "1", reason="takes minutes: set RRHF_LONG=1"),
]

PROMPTS = int(os.environ.get("RRHF_LONG_PROMPTS", "40"))
TEXT = TextSettings(max_query_length=64)


def sampling(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{"policy": "top-p", "max_new_tokens": 32, **changes})


def convert(folder: Path, weights: str) -> str:
    return convert_for_openvino(Path(smollm2_folder()), folder, weights)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return convert(tmp_path_factory.mktemp("openvino") / "fp32", "fp32")


def source(folder: str, dtype: str = "float32", **changes: Any) -> EngineModel:
    return EngineModel(OpenVINO(folder, sampling(**changes), TEXT, dtype), "t", {})


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_same_draws_again_and_in_another_order(converted: str, dtype: str, test_data: Path) -> None:
    records = hh_records(test_data, PROMPTS)
    ours = source(converted, dtype)
    drawn = answers(ours, records)
    assert answers(ours, records) == drawn
    moved = differences(drawn, answers(ours, records[::-1]))
    print(f"{moved} of {4 * PROMPTS} responses differ in the reverse order ({dtype})")
    assert moved <= 0.02 * 4 * PROMPTS


def test_greedy_responses_are_the_models_own(converted: str, test_data: Path, smollm2: tuple[Any, Any]) -> None:
    """Where they part, the two tokens are as likely to within rounding."""
    records = hh_records(test_data, PROMPTS)
    theirs = answers(source(converted, policy="greedy"), records)
    ours = local_answers(smollm2, sampling(policy="greedy"), TEXT, records)
    gaps = {r.id: first_gap(smollm2, TEXT, r, ours, theirs) for r in records if ours[r.id] != theirs[r.id]}
    print(f"{len(gaps)} of {PROMPTS} greedy responses differ, at gaps of {gaps}")
    assert all(gap < 1e-3 for gap in gaps.values())


@pytest.mark.parametrize("policy", ["beam", "diverse-beam"])
def test_beams_are_the_models_own(converted: str, policy: str, test_data: Path, smollm2: tuple[Any, Any]) -> None:
    """But for queries where a beam ends early, and for near ties: see docs/sources.md."""
    records = hh_records(test_data, PROMPTS)
    theirs = answers(source(converted, policy=policy), records)
    ours = local_answers(smollm2, sampling(policy=policy), TEXT, records)
    different = [r.id for r in records if ours[r.id] != theirs[r.id]]
    ended = [key for key in different if any(why == "stop" for _, why in ours[key] + theirs[key])]
    print(f"{policy}: {len(different)} of {PROMPTS} differ, {len(ended)} of them with a beam that ended: {different}")
    assert len(different) - len(ended) <= 0.05 * PROMPTS


def test_eight_bit_weights_draw_too(tmp_path: Path, test_data: Path) -> None:
    records = hh_records(test_data, 8)
    drawn = answers(source(convert(tmp_path / "int8", "int8"), "auto"), records)
    assert len({text for responses in drawn.values() for text, _ in responses}) > 28  # of 32
