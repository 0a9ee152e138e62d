"""A model prepared for training still decodes as it did."""

from __future__ import annotations

import pytest

from rrhf.training.forward import accept_records
from support.families import FAMILIES, draw

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["gpt-neo", "bloom", "stablelm"])
def test_padded_decoding_while_training_knows_positions(name: str) -> None:
    """As ``--watch_steps`` draws: queries are padded on the left, and not every model takes position_ids."""
    model = FAMILIES[name].make()
    expected = draw(model, "padded", policy="greedy")
    accept_records(model)
    assert draw(model, "padded", policy="greedy") == expected
