"""What a reward model reads of a query and a response: its own chat template and tokenizer, cut from the left."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from rrhf.common.errors import UserError
from rrhf.models.tokenization import EncodedRecord, TextFormat, cut_left
from rrhf.records.record import Query, Record, query_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BEGUN = "\n\nassistant: "  # as ``query_text`` joins messages


@dataclass(frozen=True)
class Row:
    """A query with one response as an encoder reads it: token ids, and token types where its tokenizer gives them."""

    ids: Sequence[int]
    types: Sequence[int] | None


class PairReader:
    """Rows of an encoder, with the special tokens its tokenizer puts around them.

    The query and the response are a pair of texts; with ``joined``, as classifiers of texts were trained, one text,
    the response right behind the query. Messages become text through the tokenizer's chat template where it has one,
    and else as ``role: content``, with the assistant's turn begun where the response stands right behind.

    Rows longer than ``context`` are cut from the left: of a pair first the query, then, where the response alone is
    too long, the response. ``cut`` counts them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int | None, joined: bool = False) -> None:
        self.tokenizer, self.context, self.joined = tokenizer, context, joined
        self.format = TextFormat(tokenizer)
        self.cut = 0
        tokenizer.truncation_side = "left"

    def rows(self, record: Record, indices: Sequence[int]) -> list[Row]:
        """One row for each of the record's responses at ``indices``."""
        messages = isinstance(record.query, list) and self.tokenizer.chat_template
        query = self.format.render(record.query) if messages else query_text(record.query)
        if self.joined and isinstance(record.query, list) and not messages:
            query += BEGUN
        return [self._row(query, record.responses[index]) for index in indices]

    def _row(self, query: str, response: str) -> Row:
        texts = (query + response,) if self.joined else (query, response)
        row = self.tokenizer(*texts)
        if self.context is not None and len(row.input_ids) > self.context:
            self.cut += 1
            alone = self.joined or len(self.tokenizer("", response).input_ids) >= self.context
            if not self.joined and alone:
                texts = ("", response)
            how = "only_first" if self.joined or not alone else "only_second"
            row = self.tokenizer(*texts, truncation=how, max_length=self.context)
        return Row(row.input_ids, row.get("token_type_ids"))


class CausalReader:
    """Rows of a causal reward model, whose score is read at their last token.

    Messages go through the chat template with the response as the assistant's turn; a text query is followed by the
    response and the end token. ``always_end`` puts the end token behind a template's rows too, unless it stands there;
    line breaks behind the last message go first, as in OpenRLHF's rows, so that ``<|im_end|>\\n`` ends in its token.
    ``unread`` is a token (padding) that does not count as the last one, as transformers' classes have it: rows end
    before it.

    Rows longer than ``context`` are cut from the left, behind a BOS that stands first. ``cut`` counts them. With
    ``together`` the other rows of the record lose the same tokens, so that all still begin alike and share it; a row's
    score then depends on what it is compared with, which is for training alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        always_end: bool = False,
        unread: int | None = None,
        together: bool = False,
    ) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.always_end, self.unread, self.together = always_end, unread, together
        self.format = TextFormat(tokenizer)
        self.cut = 0

    def encode(self, record: Record, indices: Sequence[int]) -> list[EncodedRecord]:
        """The rows of the record's responses at ``indices``, in order, with what they share written once.

        A row is ``query`` + ``responses[i]`` of an encoded record, wherever the texts part: rows that begin alike are
        one encoded record whose query is all that they share, others one each.
        """
        rows = [self._row(record.query, record.responses[index]) for index in indices]
        rows = [self._cut(row, most) for row, most in zip(rows, self._room(rows), strict=True)]
        shared = _shared(rows)
        groups = [(rows, shared)] if shared else [([row], len(row)) for row in rows]
        return [
            EncodedRecord(record.id, array("i", group[0][:n]), [array("i", row[n:]) for row in group], [])
            for group, n in groups
        ]

    def _row(self, query: Query, response: str) -> list[int]:
        ids = self._ids(query, response)
        while len(ids) > 1 and ids[-1] == self.unread:
            ids.pop()
        if not ids:
            raise UserError(f"a query and its response have no token in the reward model's vocabulary: {query!r}")
        return ids

    def _room(self, rows: list[list[int]]) -> list[int]:
        """How many tokens each row of a record keeps at most."""
        if self.context is None or max(map(len, rows), default=0) <= self.context:
            return [len(row) for row in rows]
        if not self.together:
            return [self.context] * len(rows)
        # What rows do not share they keep, as far as they have room: a response is not cut for another's sake.
        lost = min(max(map(len, rows)) - self.context, max(_shared(rows) - 1, 0))
        return [min(len(row) - lost, self.context) for row in rows]

    def _cut(self, row: list[int], most: int) -> list[int]:
        if len(row) <= most:
            return row
        self.cut += 1
        return cut_left(row, most, self.tokenizer.bos_token_id)

    def _ids(self, query: Query, response: str) -> list[int]:
        end = self.tokenizer.eos_token_id
        if isinstance(query, str):
            ids: list[int] = list(self.tokenizer(query + response).input_ids)
        else:
            messages = [*query, {"role": "assistant", "content": response}]
            text = self.format.whole(messages)
            text = text.rstrip("\n") if self.always_end else text
            ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        ends = isinstance(query, str) or self.always_end
        if ends and end is not None and ids[-1:] != [end]:
            ids.append(int(end))
        return ids


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows)))
