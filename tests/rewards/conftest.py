"""Two policies, and a count of what they are asked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import tiny
from support.logprobs import settings


@pytest.fixture(scope="session")
def rho(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "rho")


@pytest.fixture(scope="session")
def pi(rho: Path) -> Path:
    """Other weights beside the same tokenizer."""
    from rrhf.models.load import load_policy

    folder = rho.with_name("pi")
    shutil.copytree(rho, folder)
    model, _ = load_policy(settings(folder))
    for parameter in model.parameters():
        parameter.data *= 1.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many responses every forward pass of a model scored."""
    from rrhf.models import passes

    counts: list[int] = []
    plain = passes.response_logprobs

    def counting(model: Any, given: Any, *arguments: Any) -> Any:
        counts.append(sum(len(record.responses) for record in given))
        return plain(model, given, *arguments)

    monkeypatch.setattr(passes, "response_logprobs", counting)
    yield counts
