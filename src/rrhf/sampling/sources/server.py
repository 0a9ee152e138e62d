"""Responses from any OpenAI-compatible server, by chat or by plain completion, through the ``openai`` client.

Requests run in an event loop in a thread of its own: they go on while the caller writes, and a caller may have a loop
running. What is retried, for how long, and what a request may cost is decided here and not by the client, whose
retries would be hidden from the budget: each try is a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import hashlib
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rrhf.common.errors import UserError, nearest
from rrhf.common.texts import cut_at_first
from rrhf.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from rrhf.models.tokenization import TextSettings
    from rrhf.records.record import Query, Record

log = logging.getLogger(__name__)

Choice = tuple[str, str]  # a response's text and its finish, "stop" or "length"
Job = tuple[int, list[int]]  # a record's index and the numbers of its responses that one task asks for

KINDS = ("chat", "completions")
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds before the first retry, doubled to at most the second
CHECK_RETRIES = 2  # of the check, which is to answer soon
LONGEST_RETRY_AFTER = 600.0  # a server that wants us to wait longer than this is given up
PROMPT_OVERHEAD = 64  # tokens that a chat template may add, in the estimate of a request's cost
SHOWN = 300  # characters of a server's own words in an error

# How OpenAI-compatible servers say that a response did not end by itself; whatever else they say, it did.
CUT = ("length", "max_tokens", "content_filter")
BROKEN = ("error", "abort")


class BudgetReached(UserError):  # noqa: N818 - it is a limit reached, not an error made
    """The next request could exceed the budget. ``done`` records of this call were answered, and all were yielded."""

    def __init__(self, message: str, done: int) -> None:
        super().__init__(message)
        self.done = done


@dataclass(frozen=True)
class EndpointSettings:
    """Where the server is, and how much may be asked of it."""

    url: str = field(metadata={"help": "the API's root, such as http://localhost:8000/v1"})
    kind: str = field(default="chat", metadata={"help": f"one of {', '.join(KINDS)}"})
    model: str | None = field(default=None, metadata={"help": "the model's name there; default: its only one"})
    num_responses: int | None = field(default=None, metadata={"help": "responses a query; default: the sampling's"})
    concurrency: int = field(default=8, metadata={"help": "requests at the same time"})
    timeout: float = field(default=300.0, metadata={"help": "seconds for one request, from first byte to last"})
    max_retries: int = field(default=8, metadata={"help": "tries after a first one that failed"})
    max_requests: int | None = field(
        default=None, metadata={"help": "budget: most requests, failed ones and the check's own one or two counted"}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "budget: most tokens, prompts and responses, as the server counts them"}
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "the environment variable that holds the key, if one is needed"}
    )

    def __post_init__(self) -> None:
        faults = _url_faults(self.url)
        object.__setattr__(self, "url", self.url.rstrip("/"))
        if self.kind not in KINDS:
            faults.append(f"endpoint kind {self.kind}: {nearest(self.kind, KINDS)}")
        for name, least in (
            ("num_responses", 1),
            ("concurrency", 1),
            ("max_retries", 0),
            ("max_requests", 1),
            ("max_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                faults.append(f"endpoint {name} {value}: must be at least {least}")
        if not self.timeout > 0:
            faults.append(f"endpoint timeout {self.timeout}: must be above 0 seconds")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            # Not shown: it may be the key itself.
            faults.append("endpoint api_key_env: give the name of an environment variable, not the key")
        if faults:
            raise UserError("\n".join(faults))


def _url_faults(url: str) -> list[str]:
    try:
        parts = urlsplit(url)
        secret = bool(parts.username or parts.password or parts.query or parts.fragment)
    except ValueError:
        return ["the endpoint's URL cannot be read: write it like http://localhost:8000/v1"]
    if secret:
        return ["the endpoint's URL has a user, a password or a query in it: keys come from the environment only"]
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return [f"endpoint {url}: not an http address: write it like http://localhost:8000/v1"]
    if parts.path.rstrip("/").endswith("/completions"):
        return [f"endpoint {url}: give the API's root, such as http://localhost:8000/v1, and the kind apart"]
    return []


class _Failed(Exception):  # noqa: N818
    """A try that brought nothing: what was ``seen``, whether to try ``again``, and how long the server said to wait.

    ``billed``: the server may have worked for it, so its cost stays counted.
    """

    def __init__(
        self,
        seen: str,
        again: bool = True,
        status: int | None = None,
        after: float | None = None,
        billed: bool = True,
    ) -> None:
        super().__init__(seen)
        self.seen, self.again, self.status, self.after, self.billed = seen, again, status, after, billed


class _OutOfBudget(Exception):  # noqa: N818
    pass


@dataclass
class _Run:
    """What the requests of one call share."""

    client: Any
    retries: int
    patient: bool = True  # connections that fail, or take too long, are tried again
    stopping: bool = False
    held_until: float = 0.0  # by the loop's clock: nobody starts while a server has asked one of us to wait
    reserved: int = 0  # tokens of requests on the wire
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    on_wire: set[asyncio.Task[Any]] = field(default_factory=set)


class Endpoint:
    """A server ready to be asked, with the shape of a ``Sampler``: ``respond`` yields what is done as it is done.

    Args:
        settings: the server.
        sampling: policy top-p, top-k or greedy, temperature, top_p, top_k, max_new_tokens, stop, seed. ``top_k`` is
            no field of OpenAI's: it is sent as vLLM and llama.cpp take it, and a server that refuses it fails the
            check. Each request carries a ``seed`` that depends on the seed, the record's id and the response's
            number alone; what servers make of it is theirs.
        text: ``system_prompt`` and ``chat_template_kwargs``, for chat.
        sleep: waits the given seconds between tries.

    ``requests``, ``tokens`` and ``retries`` count what all calls so far have cost. The key is read from the
    environment whenever it is needed and kept nowhere.
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
        self.requests = self.tokens = self.retries = 0
        self.model = settings.model
        self._text = text
        self._sleep = sleep
        self._checked = False
        self._several = True  # whether the server gives more than one choice a request
        self._refuse_what_servers_lack()

    @property
    def responses(self) -> int:
        """Responses a query."""
        return self.settings.num_responses or self.sampling.responses

    def _refuse_what_servers_lack(self) -> None:
        if self.sampling.is_beam:
            raise UserError(
                f"{self.settings.url}: an endpoint has no --policy {self.sampling.policy}: "
                "use top-p, or a local model as the source"
            )
        if self.sampling.policy == "greedy" and self.responses != 1:
            raise UserError(f"{self.settings.url}: greedy has one response a query, not {self.responses}")
        if self._text is not None and self._text.max_query_length is not None:
            raise UserError(f"{self.settings.url}: --max_query_length needs a tokenizer, which an endpoint has not")
        has_text = self._text is not None and (self._text.system_prompt or self._text.chat_template_kwargs)
        if has_text and self.settings.kind != "chat":
            raise UserError(f"{self.settings.url}: --system_prompt and --chat_template_kwargs need the kind chat")

    # -- what callers use

    def check(self) -> None:
        """Ask the server for one token, as the work will ask for many: its address, key, model and parameters hold.

        Learns the model's name where none was given, and whether the server gives several choices a request.

        Raises:
            UserError: the package is missing, the server is down, refuses the key, does not know the model, or refuses
                a parameter.
            BudgetReached: the budget has no room for the check.
        """
        with _event_loop() as run:
            run(self._check())

    def check_query(self, record: Record) -> None:
        """Raise ``UserError`` where a record's query does not suit the endpoint; nothing is asked."""
        self._prompt(record.query, record.id)

    def respond(self, records: Sequence[Record]) -> Iterator[tuple[int, list[str], list[str]]]:
        """Yield (index of the record, texts, finish reasons) as they are done, in no fixed order.

        At most ``concurrency`` requests are under way. After a failure nothing new is asked; what is under way is
        waited for and yielded, then the error is raised. A record whose responses are not all there is not yielded.

        Raises:
            UserError: before the first request where a query does not suit the endpoint or ``check`` fails; else a
                request failed for good, by its nature or ``max_retries`` times.
            BudgetReached: the next request could exceed the budget.
        """
        prompts = [self._prompt(record.query, record.id) for record in records]
        if not prompts:
            return
        if not self._checked:
            self.check()
        results: queue.SimpleQueue[tuple[int, list[str], list[str]] | None] = queue.SimpleQueue()
        with _event_loop() as run:
            work = self._answer([record.id for record in records], prompts, results.put)
            future = run(work, wait=False)
            future.add_done_callback(lambda _: results.put(None))
            while (result := results.get()) is not None:
                yield result
            future.result()

    # -- what is sent

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

    def _body(self, prompt: dict[str, Any], record_id: str, first: int, number: int, tokens: int) -> dict[str, Any]:
        """A request for the ``number`` responses from the ``first`` on, of at most ``tokens`` tokens each."""
        greedy = self.sampling.policy == "greedy"
        body = {
            "model": self.model,
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
        top_k = self.sampling.top_k or (50 if self.sampling.policy == "top-k" else None)
        if top_k is not None and not greedy:
            extra["top_k"] = top_k
        if self._text is not None and self._text.chat_template_kwargs:
            extra["chat_template_kwargs"] = self._text.template_options()
        return {**body, "extra_body": extra} if extra else body

    # -- the work, in the event loop

    async def _check(self) -> None:
        async with self._client() as client:
            run = _Run(client, retries=min(CHECK_RETRIES, self.settings.max_retries), patient=False)
            try:
                if self.model is None:
                    self.model = self._only_model(await self._models(run))
                number = min(2, self.responses)
                got = await self._probe(run, number)
            except _OutOfBudget as reached:
                raise BudgetReached(f"{self.settings.url}: {reached}, with nothing done", 0) from None
        self._several = got >= number
        self._checked = True

    async def _probe(self, run: _Run, number: int) -> int:
        """Ask for ``number`` choices of one token, and for one where they are refused; return how many came."""
        prompt = self._prompt("Hi", "")
        try:
            return len(await self._retried(run, self._body(prompt, "", 0, number, 1), "check", probe=True))
        except _Failed as failed:
            if number > 1 and failed.status in (400, 422):
                return await self._probe(run, 1)
            raise await self._refusal(run, failed) from None

    async def _refusal(self, run: _Run, failed: _Failed) -> UserError:
        """The error of a refused probe, with the known models where the model's name may be at fault."""
        names: list[str] = []
        if failed.status in (400, 404):
            run.retries = 0
            with contextlib.suppress(_Failed, UserError, _OutOfBudget):
                names = await self._models(run)
        if names and self.model not in names:
            return UserError(
                f"{self.settings.url}: {failed.seen}: model {self.model}: {nearest(str(self.model), names)}"
            )
        return self._error(failed, self.settings.url)

    async def _models(self, run: _Run) -> list[str]:
        try:
            answer = await self._retried(run, None, "models")
        except _Failed as failed:
            raise self._error(failed, self.settings.url) from None
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{self.settings.url}: the list of models is {self._quote(answer)}: give the model's name")
        return [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]

    def _only_model(self, names: list[str]) -> str:
        if len(names) == 1:
            return names[0]
        listed = f"offers {', '.join(sorted(names))}" if names else "lists no model"
        raise UserError(f"{self.settings.url} {listed}: give the model's name")

    async def _answer(self, ids: list[str], prompts: list[dict[str, Any]], put: Callable[[Any], None]) -> None:
        """Ask for every record's responses and ``put`` the complete ones; raise the first failure at the end."""
        numbers = list(range(self.responses))
        parts: list[dict[int, Choice]] = [{} for _ in ids]
        done = 0

        def arrived(i: int, group: list[int], choices: list[Choice]) -> None:
            nonlocal done
            parts[i].update(zip(group, choices, strict=True))
            if len(parts[i]) == len(numbers):
                ordered = [parts[i][number] for number in numbers]
                parts[i] = {}
                done += 1
                put((i, [text for text, _ in ordered], [finish for _, finish in ordered]))

        async with self._client() as client:
            run = _Run(client, self.settings.max_retries)
            groups = [numbers] if self._several else [[number] for number in numbers]
            jobs = ((i, group) for i in range(len(ids)) for group in groups)
            try:
                failure = await self._drive(run, jobs, ids, prompts, arrived)
            finally:
                run.stopping = True
        if isinstance(failure, _OutOfBudget):
            raise BudgetReached(
                f"{self.settings.url}: {failure}, with {done} of {len(ids)} records done: "
                "what is done is kept; raise the budget for the rest",
                done,
            )
        if failure is not None:
            raise failure

    async def _drive(
        self,
        run: _Run,
        jobs: Iterator[Job],
        ids: list[str],
        prompts: list[dict[str, Any]],
        arrived: Callable[[int, list[int], list[Choice]], None],
    ) -> BaseException | None:
        """Keep ``concurrency`` jobs under way, report each as it ends; return the first failure when all have ended."""
        running: dict[asyncio.Task[list[Choice]], Job] = {}
        failure: BaseException | None = None
        while True:
            while failure is None and len(running) < self.settings.concurrency and (job := next(jobs, None)):
                i, group = job
                running[asyncio.create_task(self._job(run, ids[i], prompts[i], group))] = job
            if not running:
                return failure
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(finished, key=lambda task: running[task]):
                i, group = running.pop(task)
                if task.cancelled():
                    continue
                error = task.exception()
                if error is None:
                    arrived(i, group, task.result())
                else:
                    failure = failure or error
                    self._stop(run, running)

    def _stop(self, run: _Run, running: Iterable[asyncio.Task[Any]]) -> None:
        """Begin nothing new: who waits is cancelled, who is on the wire may finish."""
        run.stopping = True
        for task in running:
            if task not in run.on_wire:
                task.cancel()

    async def _job(self, run: _Run, record_id: str, prompt: dict[str, Any], wanted: list[int]) -> list[Choice]:
        """The ``wanted`` responses of one record; a server may give fewer a request than it is asked for."""
        choices: list[Choice] = []
        while len(choices) < len(wanted):
            first, left = wanted[len(choices)], len(wanted) - len(choices)
            body = self._body(prompt, record_id, first, left, self.sampling.max_new_tokens)
            try:
                choices += (await self._retried(run, body, f"{record_id}/{first}"))[:left]
            except _Failed as failed:
                raise self._error(failed, f"{self.settings.url}, record {record_id}") from None
        return choices

    async def _retried(self, run: _Run, body: dict[str, Any] | None, key: str, probe: bool = False) -> Any:
        """The choices of a request, or the list of models where ``body`` is None.

        Raises:
            _Failed: for good; where tries were repeated, what was seen last, with their number.
        """
        held = run.held_until - asyncio.get_running_loop().time()
        if held > 0:
            await self._sleep(held)
        tries = 1
        while True:
            if run.stopping:  # after a wait, too, should a cancellation have been lost in it
                raise asyncio.CancelledError
            try:
                return await self._try(run, body, probe)
            except _Failed as failed:
                if not failed.again or tries > run.retries:
                    if tries > 1:
                        failed.seen += f" ({tries} tries)"
                    raise
                if run.stopping:
                    raise asyncio.CancelledError from None
                delay = failed.after or _delay(tries, key)
                log.info("%s, %s: %s: again in %.1f seconds", self.settings.url, key, failed.seen, delay)
                if failed.after:
                    run.held_until = max(run.held_until, asyncio.get_running_loop().time() + delay)
            self.retries += 1
            await self._sleep(delay)
            tries += 1

    async def _try(self, run: _Run, body: dict[str, Any] | None, probe: bool) -> Any:
        cost = _most_tokens(body)
        await self._reserve(run, cost)
        task = asyncio.current_task()
        assert task is not None
        run.on_wire.add(task)
        used = cost  # stays where nobody says what a request has cost
        try:
            answer = await self._send(run, body)
            used = _used_tokens(answer, cost)
            return answer if body is None else self._choices(answer, probe)
        except _Failed as failed:
            used = used if failed.billed else 0
            raise
        finally:
            run.on_wire.discard(task)
            run.reserved -= cost
            self.tokens += used
            run.settled.set()
            run.settled = asyncio.Event()

    async def _reserve(self, run: _Run, cost: int) -> None:
        """Count a request in, before it is sent; wait where requests under way may turn out cheaper than feared."""
        requests, tokens = self.settings.max_requests, self.settings.max_tokens
        while tokens is not None and self.tokens + run.reserved + cost > tokens:
            if not run.reserved:
                raise _OutOfBudget(
                    f"{self.tokens} of the budget's {tokens} tokens are spent, and the next request could take {cost}"
                )
            await run.settled.wait()
        if requests is not None and self.requests >= requests:
            raise _OutOfBudget(f"the budget's {requests} requests are spent")
        self.requests += 1
        run.reserved += cost

    async def _send(self, run: _Run, body: dict[str, Any] | None) -> Any:
        """The parsed answer to one request, and every way not to get one as ``_Failed``."""
        import openai

        client = run.client
        calls: dict[str, Any] = {"chat": client.chat.completions, "completions": client.completions}
        try:
            if body is None:
                call = client.models.with_raw_response.list()
            else:
                call = calls[self.settings.kind].with_raw_response.create(**body)
            answer = await asyncio.wait_for(call, self.settings.timeout)
        except (TimeoutError, openai.APITimeoutError):
            raise _Failed(f"no whole answer within {self.settings.timeout:g} seconds", run.patient) from None
        except openai.APIStatusError as error:
            raise self._status_failure(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            reason = self._quote(str(cause or "") or type(cause).__name__)
            sent = type(cause).__name__ not in ("ConnectError", "ConnectTimeout")
            raise _Failed(f"no connection, or it broke: {reason}", run.patient, billed=sent) from None
        content = answer.http_response.content
        try:
            return json.loads(content)
        except ValueError:
            raise _Failed(f"the answer is no JSON: {self._quote(content.decode('utf-8', 'replace'))}") from None

    def _status_failure(self, error: Any) -> _Failed:
        status, body = int(error.status_code), error.body
        after = _retry_after(error.response.headers)
        # The account is empty: waiting does not fill it.
        empty = isinstance(body, dict) and body.get("code") == "insufficient_quota"
        again = (status in (408, 409, 425, 429) or status >= 500) and not empty
        seen = f"HTTP {status}: {self._quote(_words(body) or error.response.reason_phrase)}"
        if again and after is not None and after > LONGEST_RETRY_AFTER:
            again, seen = False, f"{seen}: the server asks to come back in {after:.0f} seconds"
        return _Failed(seen, again, status, after, billed=False)

    def _choices(self, answer: Any, probe: bool) -> list[Choice]:
        entries = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(entries, list) or not entries:
            raise _Failed(f"the answer has no choices: {self._quote(answer)}")
        # One token may be no text: a template's, or the first of hidden reasoning.
        return [("", "length")] * len(entries) if probe else [self._choice(entry) for entry in entries]

    def _choice(self, entry: Any) -> Choice:
        entry = entry if isinstance(entry, dict) else {}
        message = entry.get("message")
        text = message.get("content") if isinstance(message, dict) else entry.get("text")
        finish = entry.get("finish_reason")
        if not isinstance(text, str) or finish in BROKEN:
            raise _Failed(f"a choice is no text but {self._quote(entry)}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _Failed("a choice has half a character (a lone surrogate) in it")
        # Some servers leave the stop string in, or never heard of it.
        text, stopped = cut_at_first(text, self.sampling.stop)
        return text, "length" if finish in CUT and not stopped else "stop"

    # -- the client, its key, and words about what went wrong

    def _client(self) -> Any:
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise UserError("an endpoint needs the openai client: pip install 'rrhf[endpoint]'") from None
        # A client wants some key, and a server without one ignores it. The time-out is ours, over the whole request.
        return AsyncOpenAI(base_url=self.settings.url, api_key=self._key() or "none", max_retries=0, timeout=None)

    def _key(self) -> str:
        key = os.environ.get(self.settings.api_key_env, "").strip()
        if not all("!" <= character <= "~" for character in key):
            raise UserError(
                f"the environment variable {self.settings.api_key_env} holds a space, a line break or a character that "
                "no key has: set it anew"
            )
        return key

    def _quote(self, value: Any) -> str:
        """A server's words for an error: without the key, on one line, short."""
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        key = self._key()
        if key:
            text = text.replace(key, "[the key]")
        text = " ".join(text.split())
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"

    def _error(self, failed: _Failed, where: str) -> UserError:
        variable = self.settings.api_key_env
        key = f"put a key that holds there into the environment variable {variable}"
        if not self._key():
            key += ", which is not set"
        cures = {
            401: key,
            403: key,
            404: f"check the model's name ({self.model}), the kind ({self.settings.kind}) and the URL, which is the "
            "API's root and often ends in /v1",
            429: "lower the concurrency, or raise max_retries",
            None: "check that it is the API's root, often ending in /v1, that the server is up, and the time-out",
        }
        cure = cures.get(failed.status, "try again later" if failed.status and failed.status >= 500 else "")
        return UserError(f"{where}: {failed.seen}" + (f": {cure}" if cure else ""))


def request_seed(seed: int, record_id: str, response: int) -> int:
    """The seed of a request, 31 bits that all servers take, by the record and its first response's number alone."""
    text = f"{seed}/{response}/{record_id}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


def _delay(tries: int, key: str) -> float:
    """Seconds to wait after so many failed tries: exponential, less up to a quarter that depends on the request."""
    digest = hashlib.blake2b(f"{tries}/{key}".encode("utf-8", "replace"), digest_size=4).digest()
    share = int.from_bytes(digest, "big") / 2**32
    return min(FIRST_DELAY * 2.0 ** min(tries - 1, 30), LONGEST_DELAY) * (1 - share / 4)


def _retry_after(headers: Any) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date; None where there is none to read."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def _words(body: Any) -> str:
    """What an error's body says: ``message`` or ``detail`` where it has one of them, else all of it."""
    if isinstance(body, dict):
        said = body.get("message") or body.get("detail") or body.get("error")
        return said if isinstance(said, str) else json.dumps(said or body, ensure_ascii=False)
    return str(body or "")


def _most_tokens(body: dict[str, Any] | None) -> int:
    """An upper estimate of what a request costs: a token has at least a byte."""
    if body is None:
        return 0
    prompt = json.dumps(body.get("prompt") or body.get("messages"), ensure_ascii=False)
    return len(prompt.encode("utf-8", "replace")) + PROMPT_OVERHEAD + int(body["max_tokens"]) * int(body.get("n", 1))


def _used_tokens(answer: Any, cost: int) -> int:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) and total >= 0 else cost


@contextlib.contextmanager
def _event_loop() -> Iterator[Callable[..., Any]]:
    """An event loop in a thread; yields a function that runs a coroutine there, and waits for it unless told not to.

    However the block is left, by Ctrl-C too, everything in the loop is cancelled and the thread is gone.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="rrhf-endpoint", daemon=True)
    thread.start()

    def run(work: Any, wait: bool = True) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, loop)
        return future.result() if wait else future

    try:
        yield run
    finally:
        run(_cancel_all())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
