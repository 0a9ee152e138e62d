"""Dialogues in parts that share no first user turn, for what must not meet: a reward model, a policy, an evaluation.

python -m rrhf.recipes.study.dialogues HH.jsonl.gz --output FOLDER writes FOLDER/reward.jsonl (900 pairs),
policy.jsonl (500) and held_out.jsonl (what is left, about 400 of 1,800).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from rrhf.common.errors import UserError
from rrhf.records.files import write_records
from rrhf.records.formats import load_dataset_records
from rrhf.records.record import Record

FIRST_TURN = re.compile(r"\n\nHuman:(.*?)(?:\n\nAssistant:|$)", re.S)
REWARD, POLICY = 900, 500  # pairs of the parts, at least


def first_turn(record: Record) -> str:
    """What the user says first, by which dialogues are kept together."""
    found = FIRST_TURN.search(str(record.query))
    return " ".join((found[1] if found else str(record.query)).lower().split())


def split_by_first_turn(records: Iterable[Record], sizes: Sequence[int]) -> list[list[Record]]:
    """Parts of at least these sizes and a last one of what is left; no first user turn is in two of them.

    Their order depends on the texts alone.
    """
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[first_turn(record)].append(record)
    parts: list[list[Record]] = [[]]
    for turn in sorted(groups, key=lambda turn: hashlib.sha256(turn.encode()).hexdigest()):
        if len(parts) <= len(sizes) and len(parts[-1]) >= sizes[len(parts) - 1]:
            parts.append([])
        parts[-1].extend(groups[turn])
    return parts


def preferences(data: str) -> Iterable[Record]:
    """The dialogues of a file that have two responses to choose between."""
    return (record for record in load_dataset_records(data, "hh") if len(record.responses) == 2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rrhf.recipes.study.dialogues", description=__doc__)
    parser.add_argument("data", help="dialogues as Anthropic's HH has them: chosen, rejected")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the three files")
    options = parser.parse_args()
    try:
        parts = split_by_first_turn(preferences(options.data), (REWARD, POLICY))
        if len(parts) < 3:
            raise UserError(f"{options.data}: too few pairs for a reward model, a policy and an evaluation")
        for name, part in zip(("reward", "policy", "held_out"), parts, strict=True):
            file = options.output / f"{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            print(f"{file}: {write_records(file, part, overwrite=True)} pairs")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
