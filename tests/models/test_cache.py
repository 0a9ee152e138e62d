"""The policy in memory: the same one while the settings stay, and nothing of it once it is released."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch

from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings
from support import tiny


def test_a_released_policy_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = ModelSettings(str(tiny.write_model(tmp_path / "model")), dtype="float32")
    policies = PolicyCache()
    model, tokenizer = policies.get(settings)
    assert policies.get(settings)[0] is model
    model.__dict__["itself"] = model  # as trainers and hooks do: only a collection frees it
    left = weakref.ref(model)
    del model, tokenizer
    policies.release()
    assert left() is None
    assert not torch.cuda.is_available() or torch.cuda.memory_reserved() == 0, "another process can have it"
