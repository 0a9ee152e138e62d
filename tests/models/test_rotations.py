"""Rotations that change with the longest row of a forward pass are warned of, once, where a row gets there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rrhf.models.end_states import end_states
from rrhf.models.passes import response_logprobs
from rrhf.models.rotations import warn_of_length
from rrhf.sampling.sampler import sample
from rrhf.sampling.settings import SamplingSettings
from support.families import FAMILIES
from support.models import tiny_tokenizer, toy_records
from support.trees import random_record

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
FITTING, LONGER = random_record((20, (12, 3)), 1), random_record((20, (14, 3)), 2)


def phi3(**options: Any) -> Any:
    return FAMILIES["phi3"].make(original_max_position_embeddings=32, rope_parameters=dict(LONG), **options)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [line for line in caplog.messages if "its rotation changes" in line]
    caplog.clear()
    return found


@pytest.mark.parametrize("path", ["tree", "padded"])
def test_numbers_depend_on_what_is_computed_together_and_are_warned_of(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = phi3()
    with torch.no_grad():
        alone = response_logprobs(model, [FITTING], path).sums
        assert warnings(caplog) == []
        together = response_logprobs(model, [FITTING, LONGER], path).sums[:2]
        (said,) = warnings(caplog)
        assert "rows of up to 34 tokens, but past 32 its rotation" in said and "--max_length" in said
        response_logprobs(model, [LONGER], path)
    assert warnings(caplog) == []  # once is enough
    assert float((together - alone).abs().max()) > 0.1


def test_heads_and_samplers_are_warned_too(caplog: pytest.LogCaptureFixture) -> None:
    end_states(phi3().model, [LONGER], "padded")
    assert len(warnings(caplog)) == 1
    tokenizer = tiny_tokenizer()
    model = phi3(vocab_size=len(tokenizer))
    list(sample(toy_records(1), model, tokenizer, SamplingSettings(max_new_tokens=4)))
    assert warnings(caplog) == []
    list(sample(toy_records(1), model, tokenizer, SamplingSettings(max_new_tokens=40)))
    (said,) = warnings(caplog)
    assert "--max_query_length, --max_new_tokens" in said


def test_dynamic_rotations_count_from_the_context_and_others_do_not_change(caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = FAMILIES["llama"].make(rope_parameters=rope, max_position_embeddings=16)
    warn_of_length(model, 16, "--max_length")
    assert warnings(caplog) == []
    warn_of_length(model, 17, "--max_length")
    assert len(warnings(caplog)) == 1
    for name in ("llama", "gemma3", "gpt2", "opt"):
        warn_of_length(FAMILIES[name].make(), 10_000, "--max_length")
    assert warnings(caplog) == []
