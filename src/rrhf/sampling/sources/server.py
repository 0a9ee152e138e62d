"""Responses from any OpenAI-compatible server, by chat or by completion: requests made of records and settings."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rrhf.common.endpoint import EndpointClient, Question
from rrhf.common.endpoint_settings import EndpointSettings
from rrhf.common.errors import UserError
from rrhf.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from rrhf.models.tokenization import TextSettings
    from rrhf.records.record import Query, Record


class Endpoint:
    """A server as a ``Responder``.

    Args:
        settings: the server.
        sampling: policy top-p, top-k or greedy, num_responses, temperature, top_p, top_k, max_new_tokens, stop, seed.
            ``top_k`` is no field of OpenAI's: it is sent as vLLM and llama.cpp take it, and a server that refuses it
            fails the check. Each request carries a ``seed`` that depends on the seed, the record's id and the
            response's number alone; what servers make of it is theirs.
        text: ``system_prompt`` and ``chat_template_kwargs``, for chat.
        sleep: waits the given seconds between tries.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        sampling: SamplingSettings | None = None,
        text: TextSettings | None = None,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self.settings = settings
        self.sampling = sampling or SamplingSettings()
        self.client = EndpointClient(settings, sleep)
        self._text = text
        self._refuse_what_servers_lack()

    def _refuse_what_servers_lack(self) -> None:
        if self.sampling.is_beam:
            raise UserError(
                f"{self.settings.url}: an endpoint has no --policy {self.sampling.policy}: "
                "use top-p, or a local model as the source"
            )
        if self._text is not None and self._text.max_query_length is not None:
            raise UserError(
                f"{self.settings.url}: --max_query_length needs a tokenizer, and an endpoint's is not known: "
                "leave it out"
            )
        has_text = self._text is not None and (self._text.system_prompt or self._text.chat_template_kwargs)
        if has_text and self.settings.kind != "chat":
            raise UserError(f"{self.settings.url}: --system_prompt and --chat_template_kwargs need the kind chat")

    @property
    def model(self) -> str | None:
        """The name of the server's model; where none was given, after ``check`` its only one."""
        return self.client.model

    def check(self) -> None:
        """Ask the server for one token, as the work will ask for many.

        Raises:
            UserError: see ``EndpointClient.check``.
        """
        self.client.check(partial(self._body, self._prompt("Hi", ""), "", 1), self.sampling.responses)

    def check_query(self, record: Record) -> None:
        """Raise ``UserError`` where a record's query does not suit the endpoint; nothing is asked."""
        self._prompt(record.query, record.id)

    def respond(self, records: Sequence[Record]) -> Iterator[tuple[int, list[str], list[str]]]:
        """Yield (index of the record, texts, finish reasons) as they are done, in no fixed order.

        Raises:
            UserError: before the first request where a query does not suit the endpoint or ``check`` fails; else see
                ``EndpointClient.ask``.
            BudgetReached: the next request could exceed the budget.
        """
        number, tokens = self.sampling.responses, self.sampling.max_new_tokens
        questions = [
            Question(record.id, partial(self._body, self._prompt(record.query, record.id), record.id, tokens), number)
            for record in records
        ]
        if not questions:
            return
        if not self.client.checked:
            self.check()
        for i, choices in self.client.ask(questions):
            yield i, [choice.text for choice in choices], [choice.finish for choice in choices]

    def close(self) -> None:
        """Nothing is held between calls."""

    def _prompt(self, query: Query, record_id: str) -> dict[str, Any]:
        """The part of a request that holds the query."""
        if self.settings.kind == "completions":
            if not isinstance(query, str):
                raise UserError(
                    f"{self.settings.url}, record {record_id}: the query is a list of messages, and a completions "
                    "endpoint takes plain text: use the kind chat"
                )
            return {"prompt": query}
        messages = [{"role": "user", "content": query}] if isinstance(query, str) else list(query)
        system = self._text.system_prompt if self._text else None
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return {"messages": messages}

    def _body(self, prompt: dict[str, Any], record_id: str, tokens: int, first: int, number: int) -> dict[str, Any]:
        """A request for the ``number`` responses from the ``first`` on, of at most ``tokens`` tokens each."""
        greedy = self.sampling.policy == "greedy"
        body = {
            **prompt,
            "max_tokens": tokens,
            "temperature": 0.0 if greedy else self.sampling.temperature,
            # Said even where it is the API's default: servers may take theirs from the model's own configuration.
            "top_p": 1.0 if greedy else self.sampling.top_p or 1.0,
            "seed": request_seed(self.sampling.seed, record_id, first),
        }
        if number > 1:
            body["n"] = number
        if self.sampling.stop:
            body["stop"] = list(self.sampling.stop)
        extra: dict[str, Any] = {}
        if self.sampling.tokens_kept is not None and not greedy:
            extra["top_k"] = self.sampling.tokens_kept
        if self._text is not None and self._text.chat_template_kwargs:
            extra["chat_template_kwargs"] = self._text.template_options()
        return {**body, "extra_body": extra} if extra else body


def request_seed(seed: int, record_id: str, response: int) -> int:
    """The seed of a request, 31 bits that all servers take, by the record and its first response's number alone."""
    text = f"{seed}/{response}/{record_id}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
