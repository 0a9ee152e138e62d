"""Texts in a prompt, framed so that no text can end its frame, begin another's or take the next turn.

Each text stands between two lines with a mark made of a digest over all the texts of the call: whoever writes a
response cannot know it, since it depends on what he writes, and it stands in none of the texts. The mark depends on
nothing else than the seed and the texts, so the same call is the same prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

# What chat templates end and begin turns with; some servers read it in a message's text as well.
CONTROL = re.compile(
    r"<(?=[|｜][\w|▁ ]{1,40}[|｜]>|/?(?:s|bos|eos|pad|unk)>|(?:start|end)_of_turn>|</?SYS>>)|\[(?=/?INST\])", re.I
)


def frame_mark(query: str, responses: Sequence[str], seed: int) -> str:
    """16 hexadecimal digits that stand in none of the texts."""
    number = 0
    while True:
        content = json.dumps([seed, number, query, *responses])
        mark = hashlib.blake2b(content.encode("utf-8", "replace"), digest_size=8).hexdigest()
        if not any(mark in text.lower() for text in (query, *responses)):
            return mark
        number += 1


def framed(name: str, text: str, mark: str) -> str:
    """``text`` under its name, between two lines with the mark."""
    return f"{name}:\n<<begin {mark}>>\n{without_control(text)}\n<<end {mark}>>"


def without_control(text: str) -> str:
    """``text`` whose control tokens, such as ``<|im_end|>``, are broken by a space, so that they stay text."""
    return CONTROL.sub(lambda found: f"{found[0]} ", text)
