"""Which records go into which forward pass: steps from a seed, forwards from a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rrhf.models.tokenization import EncodedRecord


def tree_tokens(record: EncodedRecord) -> int:
    """Rows a record takes in a forward pass as a tree: its query once, each response less its last token."""
    return len(record.query) + sum(max(len(response) - 1, 0) for response in record.responses)


def padded_tokens(record: EncodedRecord) -> int:
    """Rows a record takes when every response has a padded row of its own."""
    longest = max((len(response) for response in record.responses), default=0)
    return len(record.responses) * (len(record.query) + longest)


SIZES = {"tree": tree_tokens, "padded": padded_tokens}


@dataclass(frozen=True)
class Forward:
    """The records of one forward pass; or one record that is too large, in ``slices`` of its responses."""

    records: tuple[EncodedRecord, ...]
    slices: tuple[EncodedRecord, ...] = ()

    def parts(self) -> list[list[EncodedRecord]]:
        """What goes through the model at a time: all the records, or slice after slice."""
        return [[part] for part in self.slices] or [list(self.records)]


def plan_forwards(records: Sequence[EncodedRecord], budget: int, path: str = "tree") -> list[Forward]:
    """Fill forward passes up to ``budget`` tokens, records of similar size together.

    A record above the budget stands alone, cut in slices of responses that each fit (a single response that does not
    fit is a slice of its own: a response is never cut in two). With one response it stands alone uncut.
    """
    size = SIZES[path]
    ordered = sorted(records, key=size, reverse=True)  # stable: the order depends on the data alone
    forwards: list[Forward] = []
    batch: list[EncodedRecord] = []
    filled = 0
    for record in ordered:
        tokens = size(record)
        if tokens > budget:
            slices = tuple(slice_record(record, budget, path))
            forwards.append(Forward((record,), slices if len(slices) > 1 else ()))  # one needs no second pass
            continue
        if path == "padded" and batch:  # every row of a padded pass is as long as the longest
            rows = sum(len(other.responses) for other in batch) + len(record.responses)
            longest = max(len(o.query) + max(map(len, o.responses), default=0) for o in [*batch, record])
            full = rows * longest > budget
        else:
            full = filled + tokens > budget
        if batch and full:
            forwards.append(Forward(tuple(batch)))
            batch, filled = [], 0
        batch.append(record)
        filled += tokens
    if batch:
        forwards.append(Forward(tuple(batch)))
    return forwards


def slice_record(record: EncodedRecord, budget: int, path: str = "tree") -> list[EncodedRecord]:
    """Cut a record into as few records of the same query as fit the budget, and those as even as can be.

    The responses stay in order. A last slice of what is left over would save no pass, while the others, filled to the
    brim, took the most memory that the budget allows.
    """
    slices = _cut(record, budget, path)
    low, high = 1, budget  # the smallest budget that takes no more slices
    while low < high:
        middle = (low + high) // 2
        even = _cut(record, middle, path)
        if len(even) > len(slices):
            low = middle + 1
        else:
            high, slices = middle, even
    return slices


def _cut(record: EncodedRecord, budget: int, path: str) -> list[EncodedRecord]:
    """Slices filled one after the other up to the budget; a response that does not fit is a slice of its own."""

    def part(start: int, stop: int) -> EncodedRecord:
        return replace(record, responses=record.responses[start:stop], scores=record.scores[start:stop])

    slices, start = [], 0
    for stop in range(2, len(record.responses) + 1):
        if SIZES[path](part(start, stop)) > budget:
            slices.append(part(start, stop - 1))
            start = stop - 1
    return [*slices, part(start, len(record.responses))]
