"""A model in an engine of its own, in this process: vLLM or OpenVINO. Token ids go in and come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rrhf.records.record import Record
from rrhf.sampling.sources.prompts import Prompts
from rrhf.sampling.sources.server import request_seed
from rrhf.sampling.sources.source import Answers


@dataclass(frozen=True)
class Request:
    """One query: its token ids, the tokens that end a response, and a seed for each response."""

    tokens: list[int]
    ends: set[int]
    seeds: list[int]


class Engine(Protocol):
    """What is asked for responses; it loads the model at its first call of ``generate``."""

    @property
    def prompts(self) -> Prompts:
        """The model's tokenizer and limits, without its weights; raises UserError where the model is not usable."""

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield (index of the request, the token ids of each response, end token or text after a stop included)."""

    def close(self) -> None:
        """Free the model."""


class EngineModel:
    """A source whose responses an engine decodes.

    The queries are encoded here and the responses decoded here, so both are the tokens that a local model has.
    """

    def __init__(self, engine: Engine, tag: str, settings: dict[str, Any]) -> None:
        self.engine, self.tag, self.settings = engine, tag, settings
        self.uses_policy_cache = False

    @property
    def prompts(self) -> Prompts:
        return self.engine.prompts

    def check(self) -> None:
        """Everything that can be known without the weights and the data."""
        _ = self.prompts

    def check_query(self, record: Record) -> None:
        self.prompts.check_query(record)

    def _request(self, record: Record) -> Request:
        sampling = self.prompts.sampling
        seeds = [request_seed(sampling.seed, record.id, n) for n in range(sampling.responses)]
        return Request(self.prompts.encode(record), self.prompts.end_tokens(record.query), seeds)

    def answer(self, records: list[Record], counts: Counter[str]) -> Answers:
        prompts = self.prompts
        before = prompts.format.queries_cut
        requests = [self._request(record) for record in records]
        if cut := prompts.format.queries_cut - before:
            counts[f"queries were cut to --max_query_length {prompts.text.max_query_length} ({self.tag})"] += cut
        for i, drawn in self.engine.generate(requests):
            responses = [prompts.response(tokens, records[i].query) for tokens in drawn]
            tags = [f"{self.tag}/{n}" for n in range(len(responses))]
            yield i, records[i].with_responses([text for text, _ in responses], [why for _, why in responses], tags)

    def close(self) -> None:
        self.engine.close()
