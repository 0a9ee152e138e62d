"""Sums and differences whose answers a function checks: the worked example of a verifiable reward (docs/data.md)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from rrhf.records.record import Record

LARGEST = 20  # of both numbers
HELD_OUT = 128  # problems for evaluation; what is left is for training
EXAMPLES = "7 + 5 = 12\n18 - 6 = 12\n9 + 14 = 23\n"  # a base model goes on with what it sees
SHOWN = {(7, "+", 5), (18, "-", 6), (9, "+", 14)}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def problems(limit: int | None = None, seed: int = 0) -> Iterator[Record]:
    """Training problems; a run's ``data.source``."""
    return islice(map(_record, _shuffled(seed)[HELD_OUT:]), limit)


def held_out_problems(limit: int | None = None, seed: int = 0) -> Iterator[Record]:
    """Problems that training does not see; a run's ``data.held_out``."""
    return islice(map(_record, _shuffled(seed)[:HELD_OUT]), limit)


def _shuffled(seed: int) -> list[tuple[int, str, int]]:
    numbers = range(1, LARGEST + 1)
    every = [(a, sign, b) for a in numbers for b in numbers for sign in "+-" if sign == "+" or a >= b]
    every = [problem for problem in every if problem not in SHOWN]
    random.Random(seed).shuffle(every)
    return every


def _record(problem: tuple[int, str, int]) -> Record:
    """The problem after three solved ones, with its answer as a response and, for rewards, as a column."""
    a, sign, b = problem
    answer = str(a + b if sign == "+" else a - b)
    query = f"{EXAMPLES}{a} {sign} {b} ="
    return Record(query=query, responses=[f" {answer}"], sources=["book/answer"], extra={"answer": answer})


def correct(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the first number of a completion is the answer, else 0; a reward function with TRL's signature."""
    return [float(first_number(text) == float(right)) for text, right in zip(completions, answer, strict=True)]


def first_number(completion: Any) -> float | None:
    """The first number in a completion, which is text or messages; None where it has none."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    found = NUMBER.search(text)
    return float(found[0]) if found else None
