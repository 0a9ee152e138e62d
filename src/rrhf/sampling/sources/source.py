"""What every source of responses is, and what all sources of a command share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.records.record import Record
from rrhf.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from rrhf.models.cache import PolicyCache

Answers = Iterator[tuple[int, Record]]


class Source(Protocol):
    """Where responses come from, as the stage uses it."""

    @property
    def tag(self) -> str:
        """What its responses are called in ``sources``, before ``/0``, ``/1``…; no two sources share one."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that its responses depend on, beside the queries."""
        ...

    @property
    def uses_policy_cache(self) -> bool:
        """Whether it loads its model into the policy cache, which others then must not find full."""
        ...

    def check(self) -> None:
        """Raise ``UserError`` where it cannot be used; called once, before any long work."""
        ...

    def check_query(self, record: Record) -> None:
        """Raise ``UserError`` where it cannot answer the record's query; called for every record before any work."""
        ...

    def answer(self, records: list[Record], counts: Counter[str]) -> Answers:
        """Yield (index of the record, the record with its responses appended) once for every record, in any order.

        What is worth a line at the end, in words → how often, is added to ``counts``.
        """
        ...

    def close(self) -> None:
        """Free what it holds. It may be asked again afterwards."""
        ...


class Responder(Protocol):
    """A server that returns texts: what ``PaidSource`` makes a ``Source`` of."""

    @property
    def model(self) -> str | None:
        """The name of the model that answers; where none was given it is known once ``check`` has asked."""
        ...

    def check(self) -> None:
        """As a ``Source``'s."""
        ...

    def check_query(self, record: Record) -> None:
        """As a ``Source``'s."""
        ...

    def respond(self, records: Sequence[Record]) -> Iterator[tuple[int, list[str], list[str]]]:
        """Yield (index of the record, texts, finish reasons "stop" or "length") as they are done, in any order."""
        ...

    def close(self) -> None:
        """Free what it holds. It may be asked again afterwards."""
        ...


@dataclass(frozen=True)
class Shared:
    """What all sources of a command share; a source's own policy and number replace those of ``sampling``.

    ``journals`` is the folder of the journals of paid answers.
    """

    model: ModelSettings
    sampling: SamplingSettings
    text: TextSettings
    limits: EndpointLimits
    policies: PolicyCache
    journals: Path
