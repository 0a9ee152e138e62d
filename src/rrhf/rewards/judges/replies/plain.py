"""A reply without what only decorates it, so that readers see words, digits and ASCII punctuation."""

from __future__ import annotations

import re
import unicodedata

from rrhf.rewards.judges.replies.scale import Refused

FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # ！ … ～ → ! … ~
PUNCTUATION = str.maketrans({"、": ",", "。": ". ", "【": "[", "】": "]", "「": '"', "」": '"', "−": "-", "⁄": "/"})
QUOTES = str.maketrans("“”„‘’«»", '"""\'\'""')
NOTHING = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\ufe0f\u20e3"))  # zero-width, and emoji's dress
THOUGHTS = re.compile(r"\s*<think>.*?</think>", re.S)
# The scale itself, in words or in brackets; "Response 1 - 5" is none.
RANGE = (
    r"[(\[]\s*(?:from\s+)?{low}\s*(?:-|–|—|to)\s*{high}\s*[)\]]"
    r"|(?<![\w.,/–—-])(?:from\s+)?{low}(?:-|–|—|\s+to\s+){high}(?![\w/–—-]|[.,][0-9])"
)


def without_thoughts(text: str) -> str:
    """``text`` without what a reasoner thought before it answered. Raises ``Refused`` where no end of that is seen."""
    thoughts = THOUGHTS.match(text)
    text = text[thoughts.end() :] if thoughts else text
    if "<think>" in text or "</think>" in text:
        raise Refused("thoughts that do not end, or do not begin")
    return text


def plain(text: str, low: float, high: float) -> str:
    """``text`` without emphasis, headings and the scale itself ("(1-5)"). Raises ``Refused`` for digits but 0 to 9."""
    text = text.replace("\r\n", "\n").translate(FULL_WIDTH).translate(PUNCTUATION).translate(QUOTES).translate(NOTHING)
    for character in text:
        if ord(character) > 127 and unicodedata.category(character)[0] == "N":
            raise Refused(f"the digit {character}, which is not one of 0 to 9")
    text = re.sub(r"<br\s*/?>", "\n", text, flags=re.I)
    text = re.sub(r"\\(?=[*_#])", "", text)
    text = re.sub(r"[*`]|__+|^[ \t]*(?:#{1,6}|>)(?=\s)", " ", text, flags=re.M)
    text = re.sub(r"[^\S\n]", " ", text)
    scale = RANGE.format(low=re.escape(f"{low:g}"), high=re.escape(f"{high:g}"))
    return re.sub(scale, " ", text, flags=re.I)
