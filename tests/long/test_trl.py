"""What ``rrhf convert --to trl-…`` writes, read by TRL's own data code in an environment of its own (``make trl-env``).

Its trainers tokenise the rows as they do in training; what they hand to their losses is compared with our records.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rrhf.records.export import exported
from rrhf.records.files import write_rows
from rrhf.records.formats import load_dataset_records
from rrhf.records.record import Record

PYTHON = Path(os.environ.get("RRHF_TRL_PYTHON", ".venv-trl/bin/python")).absolute()

pytestmark = [
    pytest.mark.skipif(os.environ.get("RRHF_LONG") != "1", reason="takes minutes: set RRHF_LONG=1"),
    pytest.mark.skipif(not PYTHON.exists(), reason="TRL is not installed here: make trl-env"),
]

READ = """
import json, sys
from pathlib import Path
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.data_utils import is_conversational

kind, rows, model, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
data = load_dataset("json", data_files=rows, split="train")
plain = {"output_dir": output, "report_to": "none", "use_cpu": True, "bf16": False, "max_length": None}
best = kind == "best"
Config, Trainer = (SFTConfig, SFTTrainer) if best else (DPOConfig, DPOTrainer)
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(model), args=Config(**plain), train_dataset=data,
    processing_class=tokenizer,
)
names = ("input_ids", "labels") if best else ("prompt_ids", "chosen_ids", "rejected_ids")
found = [{name: row[name] for name in names} for row in trainer.train_dataset]
for row in found:
    if best:
        pairs = list(zip(row["input_ids"], row["labels"]))
        row["prompt_ids"] = [i for i, label in pairs if label == -100]
        row["completion_ids"] = [i for i, label in pairs if label != -100]
texts = [{k: tokenizer.decode(v) for k, v in row.items() if k.endswith("_ids") and k != "input_ids"} for row in found]
conversational = [is_conversational(row) for row in data]
Path(output, "read.json").write_text(json.dumps({"texts": texts, "conversational": conversational}))
"""


def read_by_trl(kind: str, records: list[Record], model: Path, folder: Path) -> dict[str, Any]:
    write_rows(folder / "rows.jsonl", exported(records, f"trl-{kind}"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [kind, str(folder / "rows.jsonl"), str(model), str(folder)]
    done = subprocess.run(
        [str(PYTHON), "-c", READ, *arguments], capture_output=True, text=True, check=False,
        env={**environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "read.json").read_text())
    return found


TEXTS = [Record(query="The river was", responses=[" high.", " low.", " dry."], scores=[0.9, 0.1, 0.5], id="a")]
CHATS = [
    Record(
        query=[{"role": "user", "content": "Sky?"}], responses=["Blue.", "Green."], scores=[1.0, 0.0], id="b",
    )
]  # fmt: skip


def test_pairs_of_texts(model: Path, tmp_path: Path) -> None:
    read = read_by_trl("preference", TEXTS, model, tmp_path)
    assert read["conversational"] == [False] * 3
    assert [text["prompt_ids"] for text in read["texts"]] == ["The river was"] * 3
    pairs = [(text["chosen_ids"], text["rejected_ids"]) for text in read["texts"]]
    expected = [(" high.", " low."), (" high.", " dry."), (" dry.", " low.")]
    for (chosen, rejected), (better, worse) in zip(pairs, expected, strict=True):
        assert chosen.startswith(better) and rejected.startswith(worse)  # an end token may follow


def test_pairs_of_messages(model: Path, tmp_path: Path) -> None:
    read = read_by_trl("preference", CHATS, model, tmp_path)
    assert read["conversational"] == [True]
    (text,) = read["texts"]
    assert "Sky?" in text["prompt_ids"] and text["prompt_ids"].rstrip().endswith("assistant")
    assert text["chosen_ids"].startswith("Blue.") and text["rejected_ids"].startswith("Green.")


@pytest.mark.parametrize("records, query, best", [(TEXTS, "The river was", " high."), (CHATS, "Sky?", "Blue.")])
def test_the_best(records: list[Record], query: str, best: str, model: Path, tmp_path: Path) -> None:
    read = read_by_trl("best", records, model, tmp_path)
    (text,) = read["texts"]
    assert query in text["prompt_ids"] and text["completion_ids"].startswith(best)


def test_real_pairs(test_data: Path, model: Path, tmp_path: Path) -> None:
    records = list(load_dataset_records(test_data / "hh_harmless.jsonl.gz", limit=50))
    read = read_by_trl("preference", records, model, tmp_path)
    pairs = [record for record in records if len(record.responses) == 2]
    assert len(read["texts"]) == len(pairs)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [record.query for record in pairs]
