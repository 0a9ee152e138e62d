"""What a kind of reward is: how it is written, what makes its scorer, and what its scores depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.models.tokenization import TextSettings
from rrhf.records.record import Record

Item = tuple[Record, int]  # one response: its record and its index in it
Scorer = Callable[[Sequence[Item]], list[float | None]]  # a score a response, None for one that it cannot score


@dataclass(frozen=True)
class RewardContext:
    """What a reward needs beside its name.

    Attributes:
        device, dtype: of reward models, as ``ModelSettings`` has them.
        max_tokens_per_forward: rows of one forward pass of a reward model; None: by the device.
        text: system prompt, template arguments and query limit, for rewards that are policies.
        max_length: most tokens of query and response together, for rewards that are policies; None: their context.
        reference_model: ρ, for rewards that are differences to it.
        remote: how servers are asked, and what they may cost.
        alone: whether one of a command's processes asks for all of them; else each has its share of ``remote``.
        journals: the folder where answers that were paid for are kept; None: nowhere.
        seed: of what a reward draws, such as the order in which a judge reads responses.
        records: the file of the records that are scored, for rewards that are joined to them; None: not known.
    """

    device: str = "auto"
    dtype: str = "auto"
    max_tokens_per_forward: int | None = None
    text: TextSettings = field(default_factory=TextSettings)
    max_length: int | None = None
    reference_model: str | None = None
    remote: EndpointLimits = field(default_factory=EndpointLimits)
    alone: bool = False
    journals: Path | None = None
    seed: int = 0
    records: Path | None = None


class RewardKind(NamedTuple):
    """A line of ``REWARDS``.

    Attributes:
        forms: how such a reward is written, for help texts and messages.
        make: the argument after the name's colon (or the whole name) and the context → its scorer. What can be found
            wrong without work is refused here; what is heavy (weights) is loaded when the scorer is first called. A
            scorer that holds something has a method ``close``.
        digest: the same arguments → a digest of all that the scores depend on beside the records; "" where nobody
            knows it.
        judges_new: whether it scores any text, not only those that the records bring scores for.
        stays: whether it is asked where the command runs alone: its file, or its budget and journal, are there.
    """

    forms: tuple[str, ...]
    make: Callable[[str, RewardContext], Scorer]
    digest: Callable[[str, RewardContext], str]
    judges_new: bool = True
    stays: bool = False
