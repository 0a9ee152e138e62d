"""Replies of judges with their verdicts, from ``tests/rewards/judges/replies/*.txt``, each written by hand.

A reply begins behind a line ``=== what it is | how many responses | scores``, with the scores of each response in the
order of the aspects, responses parted by slashes, or ``refused``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent.parent / "rewards" / "judges" / "replies"
ASPECTS = ("Relevance", "Correctness", "Coherence", "Safety")


class Reply(NamedTuple):
    name: str
    number: int
    text: str
    scores: list[list[float]] | None  # None: refused


def replies() -> list[Reply]:
    found = []
    for path in sorted(FOLDER.glob("*.txt")):
        heads = re.split(r"^=== (.*) \| (\d+) \| (.*)\n", path.read_text(encoding="utf-8"), flags=re.M)
        for name, number, verdict, text in zip(heads[1::4], heads[2::4], heads[3::4], heads[4::4]):
            scores = (
                [[float(score) for score in row.split()] for row in verdict.split("/")]
                if verdict != "refused"
                else None
            )
            found.append(Reply(f"{path.stem}: {name}", int(number), text.removesuffix("\n"), scores))
    return found


def read_or_refused(text: str, number: int) -> None:
    """A reply gives each of its responses every score, within the range, or is refused with a reason."""
    from rrhf.rewards.judges.parse import Refusal, Scale, parse_reply

    found = parse_reply(text, Scale(("accuracy", "coherence"), 1, 5, integers=False), number)
    if isinstance(found, Refusal):
        assert found.reason
        return
    assert len(found) == number
    for scores in found:
        assert list(scores) == ["accuracy", "coherence"] and all(1 <= score <= 5 for score in scores.values())
