"""Dialogues in parts that share no first user turn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rrhf.recipes.study import dialogues
from rrhf.recipes.study.dialogues import first_turn, split_by_first_turn
from rrhf.records.files import read_records
from rrhf.records.record import Record


def dialogue(turn: str, number: int) -> dict[str, str]:
    start = f"\n\nHuman: {turn}\n\nAssistant: Yes.\n\nHuman: And {number}?\n\nAssistant:"
    return {"chosen": f"{start} Good {number}.", "rejected": f"{start} Bad {number}."}


def test_no_first_turn_is_in_two_parts_and_their_order_is_of_the_texts() -> None:
    records = [Record(query=f"\n\nHuman: turn {i % 7}\n\nAssistant:", id=str(i)) for i in range(30)]
    parts = split_by_first_turn(records, (10, 6))
    assert [len(part) >= size for part, size in zip(parts, (10, 6, 1), strict=True)] == [True] * 3
    assert sum(map(len, parts)) == 30 and len({record.id for part in parts for record in part}) == 30
    turns = [{first_turn(record) for record in part} for part in parts]
    assert not turns[0] & turns[1] and not turns[1] & turns[2] and not turns[0] & turns[2]
    again = split_by_first_turn(records[::-1], (10, 6))
    assert [{record.id for record in part} for part in again] == [{record.id for record in part} for part in parts]
    assert first_turn(Record(query="\n\nHuman:  Tell ME\n more\n\nAssistant: No", id="a")) == "tell me more"


def test_three_files_for_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hh.jsonl"
    file.write_text("".join(json.dumps(dialogue(f"Question {i % 40}", i)) + "\n" for i in range(60)))
    command = [sys.executable, "-m", "rrhf.recipes.study.dialogues", str(file), "--output", str(tmp_path / "out")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "too few pairs" in refused.stderr
    monkeypatch.setattr(dialogues, "REWARD", 20)
    monkeypatch.setattr(dialogues, "POLICY", 10)
    monkeypatch.setattr(sys, "argv", command[2:])
    assert dialogues.main() == 0
    parts = [list(read_records(tmp_path / "out" / f"{name}.jsonl")) for name in ("reward", "policy", "held_out")]
    assert sum(map(len, parts)) == 60 and len(parts[0]) >= 20 and len(parts[1]) >= 10 and parts[2]
    assert {record.sources[0] for part in parts for record in part} == {"human/chosen"}
