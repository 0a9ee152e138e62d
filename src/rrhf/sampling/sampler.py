"""Queries → responses. ``sample`` draws responses to records by the policy itself."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rrhf.common.texts import cut_at_first
from rrhf.records.record import DRAWN_TOKENS
from rrhf.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrhf.models.tokenization import TextFormat, TextSettings
    from rrhf.records.record import Record
    from rrhf.sampling.decoding import Response
    from rrhf.sampling.nucleus import Nucleus


class Sampler:
    """A model ready to draw responses: its path, the tree's or padded rows, is found out once for all batches."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        text: TextSettings | None = None,
        source: str | None = None,
        nucleus: Nucleus | None = None,
    ) -> None:
        from rrhf.models.load import context_length
        from rrhf.models.path_check import usable_path
        from rrhf.models.tokenization import TextFormat

        self.model, self.settings, self.nucleus = model, settings, nucleus
        self.format: TextFormat = TextFormat(tokenizer, text)
        self.source = source or settings.policy
        self.context = context_length(model.config)
        self.path = usable_path(model, longest_row=0)
        self.chosen: tuple[int, int] | None = None  # the longest query so far, and the batch size for it
        self.markers_lost = 0  # responses with special tokens that their text cannot carry

    def draw(self, queries: Sequence[list[int]], keys: Sequence[str], ends: Sequence[set[int]]) -> list[list[Response]]:
        """Responses to token ids, as many queries at once as there are."""
        from rrhf.sampling.decoding import decode, models_of, prepared
        from rrhf.sampling.side_by_side import lanes_of, side_by_side

        device = self.model.get_input_embeddings().weight.device
        stops = self._stop_check() if self.settings.stop else None
        width, steps = self.settings.width, self.settings.max_new_tokens

        def lane(numbers: Sequence[int], given_up: threading.Event) -> list[list[Response]]:
            own_keys, own_ends = [keys[i] for i in numbers], [ends[i] for i in numbers]
            policy = self.settings.how(self.settings, own_keys, own_ends, stops, device)
            return decode(self.model, [queries[i] for i in numbers], policy, steps, self.path, self.nucleus, given_up)

        lanes = lanes_of(self.model, len(queries), width) if self.path == "tree" else 1
        was_training = self.model.training
        self.model.eval()
        try:
            if lanes == 1:
                return lane(range(len(queries)), threading.Event())
            rows = -(-len(queries) // lanes) * width
            with prepared(models_of(self.model, self.nucleus), rows, steps, self.path):
                return side_by_side(lane, len(queries), lanes)
        finally:
            self.model.train(was_training)

    def _stop_check(self):  # type: ignore[no-untyped-def]
        tail = max(len(text.encode()) for text in self.settings.stop) + 8  # a token has at least a byte

        def check(tokens: list[int]) -> bool:
            text = self.format.decode(tokens[-tail:])
            return any(stop in text for stop in self.settings.stop)

        return check

    def text(self, response: Response) -> str:
        """What a record holds of a response: its text, cut at the first stop string."""
        self.markers_lost += self.format.loses_markers(response.tokens)
        return cut_at_first(self.format.decode(response.tokens), self.settings.stop)[0]

    def _drawn(self, response: Response) -> list[int] | None:
        """The tokens that were drawn; None where an end token is among them that the policy does not say: training then
        takes the text's tokens and its end token."""
        if response.finish == "stop" and response.end is None:
            at_string = cut_at_first(self.format.decode(response.tokens), self.settings.stop)[1]
            return response.drawn if at_string else None
        return response.drawn

    def end_tokens(self, record: Record) -> set[int]:
        """Every token that ends a response to the record's query."""
        return self.format.end_tokens(record.query, self.model.generation_config.eos_token_id)

    def respond(self, records: Sequence[Record]) -> Iterator[tuple[int, list[str], list[str]]]:
        """Yield (index of the record, texts, finish reasons), batches of like length together, as they are done."""
        for i, _, responses in self.respond_in_tokens(records):
            yield i, *self._said(responses)

    def _said(self, responses: Sequence[Response]) -> tuple[list[str], list[str]]:
        """Texts and finish reasons."""
        return [self.text(response) for response in responses], [response.finish for response in responses]

    def respond_in_tokens(self, records: Sequence[Record]) -> Iterator[tuple[int, list[int], list[Response]]]:
        """Yield (index of the record, its query's token ids, responses) in the same way."""
        from rrhf.models.out_of_memory import in_halves
        from rrhf.models.rotations import warn_of_length

        encoded = [self.format.encode_query(record.query) for record in records]
        # A stable sort by length: batches depend on the data and the batch size alone.
        order = sorted(range(len(records)), key=lambda i: -len(encoded[i]))
        longest = len(encoded[order[0]]) if order else 0
        if order and self.context is not None:
            self.settings.refuse_longer(longest, records[order[0]].id, self.context, "the model")
        size = self._batch_size(longest) if order else 1
        warn_of_length(self.model, longest + self.settings.max_new_tokens, "--max_query_length, --max_new_tokens")
        while order:

            def draw(size: int, left: Sequence[int] = order) -> list[list[Response]]:
                batch = left[:size]
                return self.draw(
                    [encoded[i] for i in batch],
                    [records[i].id for i in batch],
                    [self.end_tokens(records[i]) for i in batch],
                )

            drawn, fitting = in_halves(draw, min(size, len(order)), "sample", "queries", "--batch_size")
            if fitting < min(size, len(order)):
                size = fitting
                self.chosen = longest, size
            for i, responses in zip(order, drawn, strict=False):
                yield i, encoded[i], responses
            order = order[len(drawn) :]

    def _batch_size(self, longest: int) -> int:
        """Chosen once, and again where a longer query comes."""
        from rrhf.sampling.batch_size import queries_at_once

        if self.chosen is None or longest > self.chosen[0]:
            self.chosen = longest, queries_at_once(self.model, self.settings, longest, self.path)
        return self.chosen[1]

    def extend(self, records: Sequence[Record], tokens: bool = False) -> Iterator[tuple[int, Record]]:
        """Like ``respond``, with the responses appended to their records; what was scored before loses its scores.

        Args:
            tokens: note the tokens that were drawn too (``DRAWN_TOKENS``), as losses over them need.
        """
        for i, _, responses in self.respond_in_tokens(records):
            record = records[i]
            texts, finish = self._said(responses)
            extended = record.with_responses(texts, finish, [f"{self.source}/{n}" for n in range(len(texts))])
            if tokens:
                before = record.response_columns().get(DRAWN_TOKENS) or [None] * len(record.responses)
                drawn = [*before, *map(self._drawn, responses)]
                extended = replace(extended, extra={**extended.extra, DRAWN_TOKENS: drawn})
            yield i, extended


def sample(
    records: Iterable[Record],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: SamplingSettings | None = None,
    text: TextSettings | None = None,
    source: str | None = None,
) -> Iterator[Record]:
    """Draw responses to each record's query and append them, in the records' order.

    Args:
        records: only ``query`` is needed; responses that are there stay, in front.
        model, tokenizer: the policy.
        settings: how to draw. The same seed gives the same responses, whatever the batch (as far as the arithmetic of
            differently shaped matrix products agrees).
        text: system prompt, template arguments, query limit.
        source: the tag of the responses before ``/0``, ``/1``…; default: the sampling policy's name.

    Raises:
        UserError: a query and its responses do not fit the model's context, or messages have no chat template.
    """
    sampler = Sampler(model, tokenizer, settings or SamplingSettings(), text, source)
    block: list[Record] = []
    for record in records:
        block.append(record)
        if len(block) == sampler.settings.block_size:
            yield from _in_order(sampler, block)
            block = []
    yield from _in_order(sampler, block)


def _in_order(sampler: Sampler, block: list[Record]) -> Iterator[Record]:
    done = dict(sampler.extend(block))
    yield from (done[i] for i in range(len(block)))
