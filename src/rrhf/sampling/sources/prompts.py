"""Queries as the tokens of a model that may not be loaded yet: what can be checked, and what ends a response.

A local model, vLLM and OpenVINO read the same tokens and end at the same ones, so their responses can be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.texts import cut_at_first
from rrhf.models.load import context_length, tokenizer_and_config
from rrhf.models.locate import Location
from rrhf.models.tokenization import TextFormat, TextSettings
from rrhf.records.record import Query, Record
from rrhf.sampling.settings import SamplingSettings

MESSAGE_TOKENS = 32  # that a chat template may put around a message, and
TEMPLATE_TOKENS = 1024  # around all of them: queries that may be too long are tokenised before any work, others not


class Prompts:
    """The tokenizer, the context and the end tokens of a model, without its weights.

    Args:
        location: where its tokenizer and configuration are.
        shown: the model's name in messages.

    Raises:
        UserError: they cannot be loaded, or ``--max_query_length`` and ``--max_new_tokens`` exceed the context.
    """

    def __init__(self, location: Location, shown: str, sampling: SamplingSettings, text: TextSettings) -> None:
        tokenizer, config = tokenizer_and_config(location, shown)
        self.folder, self.shown, self.sampling, self.text = location.source, shown, sampling, text
        self.format = TextFormat(tokenizer, text)
        self.context = context_length(config) or sys.maxsize
        self._checked: set[type] = set()
        self._config = config.get_text_config()
        least = (text.max_query_length or 1) + sampling.max_new_tokens
        if least > self.context:
            if text.max_query_length is None:
                asked, cure = f"--max_new_tokens {sampling.max_new_tokens} and a token of a query are", "lower it"
            else:
                asked, cure = (
                    f"--max_query_length and --max_new_tokens are {least} tokens together,",
                    "lower one of them",
                )
            raise UserError(f"{asked} more than the context of {self.context} of {shown}: {cure}")

    def check_query(self, record: Record) -> None:
        """Refuse a query that the model cannot take. The first text and the first messages are encoded, of the others
        those that may be too long."""
        query = record.query
        room = self.context - self.sampling.max_new_tokens
        if type(query) in self._checked and (self.text.max_query_length or _most_tokens(query, self.text) <= room):
            return
        self._checked.add(type(query))
        self.encode(record)

    def encode(self, record: Record) -> list[int]:
        """The token ids of a record's query.

        Raises:
            UserError: they and the response do not fit the model's context.
        """
        ids = self.format.encode_query(record.query)
        self.sampling.refuse_longer(len(ids), record.id, self.context, self.shown)
        return ids

    def end_tokens(self, query: Query) -> set[int]:
        """Every token that ends a response to ``query``, as of the loaded model."""
        return self.format.end_tokens(query, self._models_end)

    @cached_property
    def _models_end(self) -> Any:
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.folder).eos_token_id
        except OSError:  # a folder without generation_config.json: its model's is made of its configuration
            return getattr(self._config, "eos_token_id", None)

    def response(self, tokens: Sequence[int], query: Query) -> tuple[str, str]:
        """(text, finish reason "stop" or "length") of what an engine decoded, its end token included or not."""
        ids = list(tokens)
        ended = bool(ids) and ids[-1] in self.end_tokens(query)
        text, stopped = cut_at_first(self.format.decode(ids[:-1] if ended else ids), self.sampling.stop)
        return text, "stop" if ended or stopped else "length"


def _most_tokens(query: Query, text: TextSettings) -> int:
    """More tokens than a query is likely to have: a token has at least a byte."""
    if isinstance(query, str):
        return len(query.encode("utf-8", "replace")) + 1
    content = sum(len(str(message).encode("utf-8", "replace")) + MESSAGE_TOKENS for message in query)
    return content + len((text.system_prompt or "").encode()) + TEMPLATE_TOKENS
