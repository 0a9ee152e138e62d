"""Fixtures that several test files share: real data where it is at hand, SmolLM2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import tiny
from support.models import SMOLLM2, smollm2_folder

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that is not part of the project (RRHF_TEST_DATA)."""
    folder = os.environ.get("RRHF_TEST_DATA")
    if not folder:
        pytest.skip("RRHF_TEST_DATA names no folder with real data")
    return Path(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with a chat template; it is for all, and nothing writes there."""
    return tiny.write_model(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder())


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """(model in fp32 on the CPU, tokenizer)."""
    from rrhf.models.load import ModelSettings, load_policy

    return load_policy(ModelSettings(model=SMOLLM2, device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices: waiting for a second thread costs more than it brings, most of all beside other work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fsspec's memory file system, empty, and an empty cache for copies of what lies there."""
    import fsspec

    from rrhf.common import remote

    monkeypatch.setenv("RRHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    remote.fetched_model.cache_clear()
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()
