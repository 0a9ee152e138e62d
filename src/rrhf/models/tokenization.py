"""Between texts and token ids: chat templates, the end token, and the exact boundary of query and response."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError, too_small
from rrhf.records.record import DRAWN_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rrhf.records.record import Query, Record


@dataclass(frozen=True)
class TextSettings:
    """How queries become tokens."""

    system_prompt: str | None = field(
        default=None, metadata={"help": "put before the messages of queries that have no system message"}
    )
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": 'arguments of the chat template, as JSON: {"enable_thinking": false}'}
    )
    max_query_length: int | None = field(
        default=None,
        metadata={"help": "most tokens of a query; longer ones are cut from the left, behind a BOS, and counted"},
    )

    def __post_init__(self) -> None:
        faults = []
        try:
            self.template_options()
        except ValueError as error:
            faults.append(f"--chat_template_kwargs {self.chat_template_kwargs}: not a JSON object: {error}")
        faults += too_small(self, max_query_length=1)
        if faults:
            raise UserError("\n".join(faults))

    def template_options(self) -> dict[str, Any]:
        """``chat_template_kwargs`` as the object it stands for."""
        options = json.loads(self.chat_template_kwargs or "{}")
        if not isinstance(options, dict):
            raise ValueError("it is no object")
        return options


@dataclass(frozen=True)
class EncodedRecord:
    """Token ids of one record: ``query`` [T_q] and k ``responses`` [T_i]; ``scores`` of the same k, ``None`` unscored.

    ``responses`` that ended carry their end token, which counts in ‖y‖; cut ones do not.
    """

    id: str
    query: Sequence[int]
    responses: Sequence[Sequence[int]]
    scores: list[float | None]


def cut_left(ids: Sequence[int], most: int, bos: int | None) -> list[int]:
    """The last ``most`` ids of a query, of which its BOS, if it has one and there is room beside it, is the first."""
    if most > 1 and ids[0] == bos:
        return [ids[0], *ids[1 - most :]]
    return list(ids[-most:])


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before a text: its BOS, nothing, or as GLM's two tokens of which none is called BOS."""
    whole: list[int] = tokenizer("a").input_ids
    bare: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    starts = (start for start in range(len(whole)) if bare and whole[start : start + len(bare)] == bare)
    return whole[: next(starts, int(whole[:1] == [tokenizer.bos_token_id]))]  # a vocabulary may lack "a"


class TextFormat:
    """Encode queries and responses for one tokenizer. Query and response are tokenised apart and joined.

    ``queries_cut`` and ``responses_cut`` count what the length limits took.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TextSettings | None = None) -> None:
        self.tokenizer = tokenizer
        self.settings = settings or TextSettings()
        self.queries_cut = 0
        self.responses_cut = 0
        bos = tokenizer.bos_token_id
        self._plain_prefix = _prefix(tokenizer)
        self._chat_end: int | None = None
        named = (bos, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = added | set(tokenizer.all_special_ids)
        self._markers = self._special - set(named)

    def render(self, query: Query) -> str:
        """The text the model reads for ``query``: itself, or its messages through the chat template."""
        if isinstance(query, str):
            if self.settings.system_prompt is not None:
                raise UserError("--system_prompt needs queries that are lists of messages; this one is plain text")
            return query
        messages = list(query)
        if self.settings.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.settings.system_prompt})
        return self._template(messages, add_generation_prompt=True)

    def whole(self, messages: list[dict[str, str]]) -> str:
        """The text of a finished dialogue through the chat template: no turn is opened behind it."""
        return self._template(messages, add_generation_prompt=False)

    def _template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                "a query is a list of messages, but the model's tokenizer has no chat template: "
                "use an instruction-tuned model, or queries as plain text"
            )
        import jinja2

        options = self.settings.template_options()
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # the last two of wrong or unknown arguments
            given = f", or --chat_template_kwargs {self.settings.chat_template_kwargs}" if options else ""
            raise UserError(f"the model's chat template refuses the messages of a query{given}: {error}") from error
        return text

    def encode_query(self, query: Query) -> list[int]:
        """Token ids of a query, cut from the left to ``max_query_length``; never empty.

        A BOS that stands first, the tokenizer's or a chat template's, counts in the limit and stays.

        Raises:
            UserError: messages without a chat template, or a query without any token.
        """
        ids: list[int] = self.tokenizer(self.render(query), add_special_tokens=False).input_ids
        if not ids:  # a BOS alone would be another query
            raise UserError(f"a query has no token in this model's vocabulary: {query!r}")
        if isinstance(query, str):
            ids = self._plain_prefix + ids
        limit = self.settings.max_query_length
        if limit is not None and len(ids) > limit:
            self.queries_cut += 1
            ids = cut_left(ids, limit, self.tokenizer.bos_token_id)
        return ids

    def end_token(self, query: Query) -> int:
        """The token that ends a response to ``query``: what the template closes an assistant turn with, or EOS."""
        if isinstance(query, str):
            return self._eos()
        if self._chat_end is None:
            self._chat_end = self._find_chat_end()
        return self._chat_end

    def end_tokens(self, query: Query, models_own: int | Sequence[int] | None) -> set[int]:
        """Every token that ends a response to ``query``: the template's, the tokenizer's, and the model's own, which
        its generation configuration names."""
        ends = {self.end_token(query)}
        for named in (self.tokenizer.eos_token_id, models_own):
            ends |= {int(token) for token in (named if isinstance(named, Sequence) else [named]) if token is not None}
        return ends

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError("the model's tokenizer has no end-of-sequence token: set tokenizer.eos_token and save it")
        return int(self.tokenizer.eos_token_id)

    def _find_chat_end(self) -> int:
        mark = "rrhf-mark"
        text = self._template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}], add_generation_prompt=False
        )
        ids = self.tokenizer(text.rpartition(mark)[2].lstrip(), add_special_tokens=False).input_ids
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return int(ids[0]) if ids and ids[0] in special else self._eos()

    def encode_response(self, query: Query, response: str, finish: str) -> list[int]:
        """Token ids of a response; one that ended (``finish`` "stop") gets its end token, a cut one does not."""
        ids: list[int] = self.tokenizer(response, add_special_tokens=False).input_ids
        return [*ids, self.end_token(query)] if finish == "stop" else ids

    def response_ids(self, record: Record, index: int) -> list[int]:
        """``encode_response`` of a record's response, or the tokens that were drawn.

        They are those that the record has (``DRAWN_TOKENS``), where they are this vocabulary's of that text.
        """
        response = record.responses[index]
        drawn = record.response_columns().get(DRAWN_TOKENS)
        tokens = None if drawn is None else drawn[index]
        if tokens and self.decode(tokens).startswith(response):  # a text may end at a stop string
            return list(tokens)
        return self.encode_response(record.query, response, record.finish[index])

    def encode_record(self, record: Record, max_length: int | None = None) -> EncodedRecord:
        """Encode a record; ``max_length`` bounds query and response together, and cuts the response from the right.

        A response the limit cut loses its end token with its tail. Where the query leaves no room, responses are
        empty: callers skip such records and count them. What a response is, ``response_ids`` says.
        """
        query = self.encode_query(record.query)
        responses = []
        for index in range(len(record.responses)):
            ids = self.response_ids(record, index)
            if max_length is not None and len(query) + len(ids) > max_length:
                self.responses_cut += 1
                ids = ids[: max(0, max_length - len(query))]
            responses.append(ids)
        scores: list[float | None] = list(record.scores) or [None] * len(responses)
        return EncodedRecord(record.id, query, responses, scores)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response's ids, which ``encode_response`` turns into these ids again where a text can.

        BOS, EOS, padding, the unknown token and the token that ends a turn are left out. Other special tokens are
        parts of what was said, such as GPT-OSS's ``<|channel|>``: they stay, unless ``loses_markers``. Records hold
        texts and, but for losses over tokens, no ids. So ids do not come back where the same text has a likelier split
        into tokens, where bytes are no whole characters, and, with SentencePiece vocabularies, where a response does
        not begin with a space: the first word loses its space when it is decoded and gets one when it is encoded.
        """
        text = self._text_with_markers(ids)
        if text is None:
            text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def loses_markers(self, ids: Sequence[int]) -> bool:
        """Whether a response has special tokens that its text cannot carry: encoded, it would not have them again."""
        return bool(self._markers_in(ids)) and self._text_with_markers(ids) is None

    def _markers_in(self, ids: Sequence[int]) -> set[int]:
        """The special tokens among a response's ids that are parts of what was said."""
        markers = self._markers.intersection(ids)
        if markers and self.tokenizer.chat_template:
            with contextlib.suppress(UserError):  # a template that refuses our probe ends no turn that we know of
                self._chat_end = self._find_chat_end() if self._chat_end is None else self._chat_end
        return markers - {self._chat_end}

    def _text_with_markers(self, ids: Sequence[int]) -> str | None:
        """The text of a response with markers in it; ``None`` where it has none, or they would not come back."""
        markers = self._markers_in(ids)
        if not markers:
            return None
        kept = [number for number in ids if number in markers or number not in self._special]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        again = self.tokenizer(text, add_special_tokens=False).input_ids
        come_back = [i for i in again if i in self._special] == [i for i in kept if i in self._special]
        return text if come_back else None
