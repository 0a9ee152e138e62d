"""A model on this machine as a source of responses."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings, context_length
from rrhf.models.locate import locate
from rrhf.models.tokenization import TextFormat, TextSettings
from rrhf.records.record import Query, Record
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.source import Answers

if TYPE_CHECKING:
    from rrhf.models.cache import PolicyCache

# Queries that may be too long are tokenised before any work, others not.
MESSAGE_TOKENS = 32  # that a chat template may put around a message
TEMPLATE_TOKENS = 1024  # that it may put around all of them


class LocalModel:
    """A model on this machine, loaded when its first batch comes; it is freed when another one is loaded."""

    uses_policy_cache = True

    def __init__(
        self, model: ModelSettings, sampling: SamplingSettings, text: TextSettings, tag: str, policies: PolicyCache
    ) -> None:
        self.model, self.sampling, self.text, self.tag, self.policies = model, sampling, text, tag, policies
        self.sampler: Sampler | None = None
        self.format: TextFormat | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All that its responses depend on; the weights themselves, since others may come into the same folder."""
        return {
            "model": self.model.model,
            "weights": model_digest(self.model.model),
            "dtype": self.model.dtype,
            **asdict(self.sampling),
            **asdict(self.text),
            "tag": self.tag,
        }

    def check(self) -> None:
        """Everything that can be known without the weights and the data."""
        self.sampling.how.load()
        location = locate(self.model.model)
        from transformers import AutoConfig, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(location.tokenizer)
            config = AutoConfig.from_pretrained(location.source)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(f"--model {self.model.model}: cannot be loaded: {error}") from error
        self.format = TextFormat(tokenizer, self.text)
        self.known: set[type] = set()
        self.context = context_length(config) or sys.maxsize
        least = (self.text.max_query_length or 1) + self.sampling.max_new_tokens
        if least > self.context:
            raise UserError(
                f"--max_query_length and --max_new_tokens are {least} tokens together, more than the context of "
                f"{self.context} of {self.model.model}: lower one of them"
            )

    def check_query(self, record: Record) -> None:
        """Refuse a query that the model cannot take. The first text and the first messages are encoded, of the others
        those that may be too long."""
        if self.format is None:
            return
        query = record.query
        room = self.context - self.sampling.max_new_tokens
        if type(query) in self.known and (self.text.max_query_length or _most_tokens(query, self.text) <= room):
            return
        self.known.add(type(query))
        length = len(self.format.encode_query(query))
        if length > room:
            raise UserError(
                f"record {record.id}: a query of {length} tokens and --max_new_tokens {self.sampling.max_new_tokens} "
                f"are more than the context of {self.context} of {self.model.model}: give --max_query_length {room}"
            )

    def answer(self, records: list[Record], counts: Counter[str]) -> Answers:
        if self.sampler is None:
            self.sampler = Sampler(*self.policies.get(self.model), self.sampling, self.text, self.tag)
        cut_before, lost_before = self.sampler.format.queries_cut, self.sampler.markers_lost
        yield from self.sampler.extend(records)
        if cut := self.sampler.format.queries_cut - cut_before:
            counts[f"queries were cut to --max_query_length {self.text.max_query_length} ({self.tag})"] += cut
        if lost := self.sampler.markers_lost - lost_before:
            counts[f"responses lost special tokens that their text cannot carry ({self.tag})"] += lost

    def close(self) -> None:
        self.sampler = None


def _most_tokens(query: Query, text: TextSettings) -> int:
    """More tokens than a query is likely to have: a token has at least a byte."""
    if isinstance(query, str):
        return len(query.encode("utf-8", "replace")) + 1
    content = sum(len(str(message).encode("utf-8", "replace")) + MESSAGE_TOKENS for message in query)
    return content + len((text.system_prompt or "").encode()) + TEMPLATE_TOKENS
