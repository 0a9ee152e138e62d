"""A model on this machine as a source of responses."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings
from rrhf.models.locate import locate
from rrhf.models.tokenization import TextSettings
from rrhf.records.record import Record
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.prompts import Prompts
from rrhf.sampling.sources.source import Answers

if TYPE_CHECKING:
    from rrhf.models.cache import PolicyCache


class LocalModel:
    """A model on this machine, loaded when its first batch comes; it is freed when another one is loaded."""

    uses_policy_cache = True

    def __init__(
        self, model: ModelSettings, sampling: SamplingSettings, text: TextSettings, tag: str, policies: PolicyCache
    ) -> None:
        self.model, self.sampling, self.text, self.tag, self.policies = model, sampling, text, tag, policies
        self.sampler: Sampler | None = None
        self.prompts: Prompts | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All that its responses depend on; the weights themselves, since others may come into the same folder."""
        return {
            "model": self.model.model,
            "weights": model_digest(self.model.model),
            "dtype": self.model.dtype,
            "attn_implementation": self.model.attn_implementation,
            **asdict(self.sampling),
            **self.sampling.how.code(),
            **asdict(self.text),
            "tag": self.tag,
        }

    def check(self) -> None:
        """Everything that can be known without the weights and the data."""
        self.sampling.how.load()
        self.prompts = Prompts(locate(self.model.model), self.model.model, self.sampling, self.text)

    def check_query(self, record: Record) -> None:
        """Refuse a query that the model cannot take."""
        if self.prompts is not None:
            self.prompts.check_query(record)

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
