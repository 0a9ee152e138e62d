"""A model on this machine as a source of responses."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rrhf.models.adapters import is_adapter
from rrhf.models.folders import check_folder, resolve_model
from rrhf.models.gguf import gguf_as_folder
from rrhf.models.load import ModelSettings
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

    def __init__(
        self, model: ModelSettings, sampling: SamplingSettings, text: TextSettings, tag: str, policies: PolicyCache
    ) -> None:
        self.model, self.sampling, self.text, self.tag, self.policies = model, sampling, text, tag, policies
        self.sampler: Sampler | None = None
        self.prompts: Prompts | None = None
        self.settings = {"model": model.model, "dtype": model.dtype, **asdict(sampling), **asdict(text), "tag": tag}

    def check(self) -> None:
        """Everything that can be known without the weights and the data."""
        name = resolve_model(self.model.model)
        if is_adapter(name):
            return  # its loading says what is wrong with it, or with its base model
        if name.endswith(".gguf"):
            name = str(gguf_as_folder(Path(name)))
        check_folder(name)
        self.prompts = Prompts(name, self.model.model, self.sampling, self.text)

    def check_query(self, record: Record) -> None:
        """Refuse a query that the model cannot take."""
        if self.prompts is not None:
            self.prompts.check_query(record)

    def answer(self, records: list[Record], counts: Counter[str]) -> Answers:
        if self.sampler is None:
            self.sampler = Sampler(*self.policies.get(self.model), self.sampling, self.text, self.tag)
        before = self.sampler.format.queries_cut
        yield from self.sampler.extend(records)
        if cut := self.sampler.format.queries_cut - before:
            counts[f"queries were cut to --max_query_length {self.text.max_query_length} ({self.tag})"] += cut

    def close(self) -> None:
        self.sampler = None
