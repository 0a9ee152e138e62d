"""What the tests of the engines (vLLM, OpenVINO) share: models that they can run, and queries."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rrhf.records.record import Record
from support import tiny


def write_engine_model(folder: Path) -> Path:
    """``tiny.write_model`` with heads of 32: vLLM's attention on a CPU has none smaller."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny.write_model(folder)
    sizes = LlamaConfig.from_pretrained(folder).to_dict() | {"hidden_size": 128, "head_dim": 32}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


# What converts models for OpenVINO; it lies in an environment of its own (make openvino-env).
OPTIMUM = os.environ.get("RRHF_OPTIMUM_CLI", "optimum-cli")
CAN_CONVERT = shutil.which(OPTIMUM) is not None


def convert_for_openvino(model: Path, folder: Path, weights: str) -> str:
    """Convert a model by the command that docs/sources.md gives; its weights as ``weights`` (fp32, int8) say."""
    task = ["--task", "text-generation-with-past", "--weight-format", weights]
    command = [OPTIMUM, "export", "openvino", "--model", str(model), *task, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return str(folder)


def river_records(count: int) -> list[Record]:
    """Queries of several lengths."""
    return [Record(f"The river number {i}" + " and another one" * (i % 5), id=f"q{i}") for i in range(count)]


def hh_records(folder: Path, count: int) -> list[Record]:
    """Dialogues of HH up to the last turn of the assistant."""
    mark = "\n\nAssistant:"
    with gzip.open(folder / "hh_harmless.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["chosen"] for line, _ in zip(file, range(count))]
    return [Record(text[: text.rindex(mark) + len(mark)], id=f"hh{i}") for i, text in enumerate(texts)]


def answers(source: Any, records: Sequence[Record]) -> dict[str, list[tuple[str, str]]]:
    """Record id → (text, finish reason) of each response."""
    drawn = (record for _, record in source.answer(list(records), Counter()))
    return {record.id: list(zip(record.responses, record.finish, strict=True)) for record in drawn}


def differences(one: dict[str, list[tuple[str, str]]], other: dict[str, list[tuple[str, str]]]) -> int:
    """How many responses of ``other`` are not those of ``one``."""
    return sum(a != b for key in other for a, b in zip(one[key], other[key], strict=True))


def local_answers(loaded: tuple[Any, Any], settings: Any, text: Any, records: Sequence[Record]) -> dict[str, Any]:
    """``answers`` of a loaded model itself."""
    from rrhf.sampling.sampler import Sampler

    drawn = dict(Sampler(*loaded, settings, text).extend(list(records)))
    return {r.id: list(zip(r.responses, r.finish, strict=True)) for r in drawn.values()}


def first_gap(loaded: tuple[Any, Any], text: Any, record: Record, ours: Any, theirs: Any) -> float:
    """The difference of the two log-probabilities, under the model, where two greedy responses part."""
    import torch

    from rrhf.models.tokenization import TextFormat

    model, tokenizer = loaded
    form = TextFormat(tokenizer, text)
    one, other = (form.encode_response(record.query, *side[record.id][0]) for side in (ours, theirs))
    place = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    row = torch.tensor([form.encode_query(record.query) + one[:place]])
    with torch.no_grad():
        logits = model(input_ids=row).logits[0, -1].log_softmax(dim=-1)
    return float((logits[one[place]] - logits[other[place]]).abs())
