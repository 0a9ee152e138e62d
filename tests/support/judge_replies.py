"""Replies of judges with their verdicts, from ``tests/rewards/judges/replies/*.txt``, each written by hand.

A reply begins behind a line ``=== what it is | how many responses | scores``, with the scores of each response in the
order of the aspects, responses parted by slashes, or ``refused``. ``judging`` is a judge on loopback.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from support import misbehaving as bad

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


@contextlib.contextmanager
def judging(folder: Path, **values: Any) -> Iterator[bad.Misbehaving]:
    """A judge on loopback that likes long responses, with its file in ``folder``, ``judge.yaml``."""

    def scores(handler: bad.Handler, body: dict[str, Any]) -> None:
        texts = re.findall(r"Response \d+:\n<<begin .*>>\n([\s\S]*?)\n<<end", body["messages"][-1]["content"])
        lines = [
            f"Response {place}: " + ", ".join(f"{name}: {min(5, 1 + len(text) // 8)}" for name in ASPECTS)
            for place, text in enumerate(texts, 1)
        ]
        handler.send_json(bad.answer(body, ["\n".join(lines)]))

    with bad.misbehaving() as server:
        server.default = scores
        settings = {"url": server.url, "model": "m", "json": "never", **values}
        (folder / "judge.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        yield server


def prompts_to(server: bad.Misbehaving) -> list[str]:
    """What a judge was asked so far, without the checks."""
    return [post["messages"][-1]["content"] for post in server.posts if post["max_tokens"] > 1]
