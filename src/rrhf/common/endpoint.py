"""Requests to an OpenAI-compatible server through the ``openai`` client: bodies in, choices out, as they are done.

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
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rrhf.common.endpoint_settings import EndpointSettings
from rrhf.common.errors import UserError, nearest
from rrhf.common.event_loop import event_loop
from rrhf.common.imports import of_extra
from rrhf.common.texts import cut_at_first

log = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds before the first retry, doubled to at most the second
CHECK_RETRIES = 2  # of the check, which is to answer soon
LONGEST_RETRY_AFTER = 600.0  # a server that wants us to wait longer than this is given up
PROMPT_OVERHEAD = 64  # tokens that a chat template may add, in the estimate of a request's cost
SHOWN = 300  # characters of a server's own words in an error

# How OpenAI-compatible servers say that a response did not end by itself; whatever else they say, it did.
CUT = ("length", "max_tokens", "content_filter")
BROKEN = ("error", "abort")

OF_THE_REQUEST = (400, 413, 422)  # HTTP statuses that say the request is at fault: too long, or filtered

Body = Callable[[int, int], dict[str, Any]]


class Choice(NamedTuple):
    """One answer of a server: its text before any stop string, and "stop" or "length"."""

    text: str
    finish: str


@dataclass(frozen=True)
class Question:
    """What is asked about one record.

    Args:
        id: the record's, for messages.
        body: the request for ``number`` choices from the ``first`` on, ``body(first, number)``: what the API takes
            beside the model's name. It must hold ``max_tokens`` and, where ``number`` is above 1, ``n``; choices are
            cut at its ``stop``. What the openai client does not know goes under ``extra_body``.
        number: choices that are wanted; a server that gives fewer is asked again, from the first one missing.
    """

    id: str
    body: Body
    number: int = 1


class BudgetReached(UserError):  # noqa: N818 - it is a limit reached, not an error made
    """The next request could exceed the budget. ``done`` questions of this call were answered, and all were yielded."""

    def __init__(self, message: str, done: int) -> None:
        super().__init__(message)
        self.done = done


class RequestRefused(UserError):  # noqa: N818 - as the one above
    """A request failed for good; ``status`` is the HTTP status of its last try, None where no answer came."""

    status: int | None = None


class _Failed(Exception):  # noqa: N818
    """A try without an answer: the ``reason``, whether to try ``again``, and how long the server asks to wait.

    ``billed``: the server may have worked for it, so its cost stays counted.
    """

    def __init__(
        self,
        reason: str,
        again: bool = True,
        status: int | None = None,
        after: float | None = None,
        billed: bool = True,
    ) -> None:
        super().__init__(reason)
        self.reason, self.again, self.status, self.after, self.billed = reason, again, status, after, billed


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


@dataclass(frozen=True)
class _Job:
    """A request under way, for the ``numbers`` of the choices to the question at ``index``."""

    index: int
    question: Question
    numbers: list[int]


class EndpointClient:
    """A server ready to be asked.

    Args:
        settings: the server, and the limits.
        sleep: waits the given seconds between tries.

    ``requests``, ``tokens`` and ``retries`` count what all calls so far have cost. The key is read from the
    environment whenever it is needed and kept nowhere.
    """

    def __init__(self, settings: EndpointSettings, sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep) -> None:
        self.settings = settings
        self.requests = self.tokens = self.retries = 0
        self.model = settings.model
        self.checked = False
        self._sleep = sleep
        self._several = True  # whether the server gives more than one choice a request

    # -- what callers use

    def check(self, probe: Body, number: int = 1) -> None:
        """Ask the server for one token, as the work will ask for many: its address, key, model and parameters hold.

        Learns the model's name where none was given, and whether the server gives several choices a request.

        Args:
            probe: as a ``Question``'s ``body``, with ``max_tokens`` 1.
            number: choices that the work's questions want.

        Raises:
            UserError: the package is missing, the server is down, refuses the key, does not know the model, or refuses
                a parameter; ``RequestRefused`` where the server said so, with its status.
            BudgetReached: the budget has no room for the check.
        """
        with event_loop("rrhf-endpoint") as run:
            run(self._check(probe, min(2, number)))

    def ask(
        self, questions: Sequence[Question], refused: Callable[[int, RequestRefused], None] | None = None
    ) -> Iterator[tuple[int, list[Choice]]]:
        """Yield (index of the question, its choices) as they are done, in no fixed order.

        At most ``concurrency`` requests are under way. After a failure nothing new is asked; what is under way is
        waited for and yielded, then the error is raised. A question whose choices are not all there is not yielded.

        Args:
            questions: what is asked.
            refused: told the index of a question that the server will not take (a status of ``OF_THE_REQUEST``) and
                why, in a thread of its own; the others go on. None: that is a failure too.

        Raises:
            UserError: a request failed for good, by its nature or ``max_retries`` times.
            BudgetReached: the next request could exceed the budget.
        """
        results: queue.SimpleQueue[tuple[int, list[Choice]] | None] = queue.SimpleQueue()
        with event_loop("rrhf-endpoint") as run:
            future = run(self._answer(questions, results.put, refused), wait=False)
            future.add_done_callback(lambda _: results.put(None))
            while (result := results.get()) is not None:
                yield result
            future.result()

    # -- the check

    async def _check(self, probe: Body, number: int) -> None:
        async with self._client() as client:
            run = _Run(client, retries=min(CHECK_RETRIES, self.settings.max_retries), patient=False)
            try:
                if self.model is None:
                    self.model = self._only_model(await self._models(run))
                given = await self._probe(run, probe, number)
            except _OutOfBudget as reached:
                raise BudgetReached(f"{self.settings.url}: {reached}, with nothing done", 0) from None
        self._several = given >= number
        self.checked = True

    async def _probe(self, run: _Run, probe: Body, number: int) -> int:
        """Ask for ``number`` choices of one token, and for one where they are refused; return how many came."""
        try:
            return len(await self._retried(run, probe(0, number), "check", probe=True))
        except _Failed as failed:
            if number > 1 and failed.status in (400, 422):
                return await self._probe(run, probe, 1)
            raise await self._refusal(run, failed) from None

    async def _refusal(self, run: _Run, failed: _Failed) -> UserError:
        """The error of a refused probe, with the known models where the model's name may be at fault."""
        names: list[str] = []
        if failed.status in (400, 404):
            run.retries = 0
            with contextlib.suppress(_Failed, UserError, _OutOfBudget):
                names = await self._models(run)
        if names and self.model not in names:
            unknown = f"model {self.model}: {nearest(str(self.model), names)}"
            return self._refused(failed, f"{self.settings.url}: {failed.reason}: {unknown}")
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

    # -- the work, in the event loop

    async def _answer(
        self,
        questions: Sequence[Question],
        put: Callable[[Any], None],
        refused: Callable[[int, RequestRefused], None] | None,
    ) -> None:
        """Ask every question and ``put`` the complete answers; raise the first failure at the end."""
        parts: list[dict[int, Choice]] = [{} for _ in questions]
        done = 0

        def arrived(job: _Job, choices: list[Choice]) -> None:
            nonlocal done
            part = parts[job.index]
            part.update(zip(job.numbers, choices, strict=True))
            if len(part) == job.question.number:
                done += 1
                put((job.index, [part[number] for number in range(len(part))]))
                parts[job.index] = {}

        async with self._client() as client:
            run = _Run(client, self.settings.max_retries)
            try:
                failure = await self._drive(run, self._jobs(questions), arrived, refused)
            finally:
                run.stopping = True
        if isinstance(failure, _OutOfBudget):
            raise BudgetReached(
                f"{self.settings.url}: {failure}, with {done} of {len(questions)} records done: "
                "what is done is kept; raise the budget for the rest",
                done,
            )
        if failure is not None:
            raise failure

    def _jobs(self, questions: Sequence[Question]) -> Iterator[_Job]:
        for index, question in enumerate(questions):
            numbers = list(range(question.number))
            for group in [numbers] if self._several else [[number] for number in numbers]:
                yield _Job(index, question, group)

    async def _drive(
        self,
        run: _Run,
        jobs: Iterator[_Job],
        arrived: Callable[[_Job, list[Choice]], None],
        refused: Callable[[int, RequestRefused], None] | None,
    ) -> BaseException | None:
        """Keep ``concurrency`` jobs under way, report each as it ends; return the first failure when all have ended."""
        running: dict[asyncio.Task[list[Choice]], _Job] = {}
        failure: BaseException | None = None
        while True:
            while failure is None and len(running) < self.settings.concurrency and (job := next(jobs, None)):
                running[asyncio.create_task(self._work(run, job))] = job
            if not running:
                return failure
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(finished, key=lambda task: (running[task].index, running[task].numbers)):
                job = running.pop(task)
                if task.cancelled():
                    continue
                error = task.exception()
                if error is None:
                    arrived(job, task.result())
                elif refused is not None and isinstance(error, RequestRefused) and error.status in OF_THE_REQUEST:
                    refused(job.index, error)
                else:
                    failure = failure or error
                    self._stop(run, running)

    def _stop(self, run: _Run, running: Iterable[asyncio.Task[Any]]) -> None:
        """Begin nothing new: who waits is cancelled, who is on the wire may finish."""
        run.stopping = True
        for task in running:
            if task not in run.on_wire:
                task.cancel()

    async def _work(self, run: _Run, job: _Job) -> list[Choice]:
        """The choices of one job; a server may give fewer a request than it is asked for."""
        choices: list[Choice] = []
        while len(choices) < len(job.numbers):
            first, left = job.numbers[len(choices)], len(job.numbers) - len(choices)
            try:
                body = job.question.body(first, left)
                choices += (await self._retried(run, body, f"{job.question.id}/{first}"))[:left]
            except _Failed as failed:
                raise self._error(failed, f"{self.settings.url}, record {job.question.id}", of_record=True) from None
        return choices

    async def _retried(self, run: _Run, body: dict[str, Any] | None, key: str, probe: bool = False) -> Any:
        """The choices of a request, or the list of models where ``body`` is None.

        Raises:
            _Failed: for good; where tries were repeated, the last one's reason, with their number.
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
                        failed.reason += f" ({tries} tries)"
                    raise
                if run.stopping:
                    raise asyncio.CancelledError from None
                delay = failed.after or _delay(tries, key)
                log.info("%s, %s: %s: again in %.1f seconds", self.settings.url, key, failed.reason, delay)
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
            return answer if body is None else self._choices(answer, body, probe)
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
                call = calls[self.settings.kind].with_raw_response.create(model=self.model, **body)
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
        except (ValueError, RecursionError):
            raise _Failed(f"the answer is no JSON: {self._quote(content.decode('utf-8', 'replace'))}") from None

    def _status_failure(self, error: Any) -> _Failed:
        status, body = int(error.status_code), error.body
        after = _retry_after(error.response.headers)
        # The account is empty: waiting does not fill it.
        empty = isinstance(body, dict) and body.get("code") == "insufficient_quota"
        again = (status in (408, 409, 425, 429) or status >= 500) and not empty
        reason = f"HTTP {status}: {self._quote(_error_message(body) or error.response.reason_phrase)}"
        if again and after is not None and after > LONGEST_RETRY_AFTER:
            again, reason = False, f"{reason}: the server asks to come back in {after:.0f} seconds"
        return _Failed(reason, again, status, after, billed=False)

    def _choices(self, answer: Any, body: dict[str, Any], probe: bool) -> list[Choice]:
        entries = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(entries, list) or not entries:
            raise _Failed(f"the answer has no choices: {self._quote(answer)}")
        # One token may be no text: a template's, or the first of hidden reasoning.
        if probe:
            return [Choice("", "length")] * len(entries)
        return [self._choice(entry, body.get("stop", ())) for entry in entries]

    def _choice(self, entry: Any, stop: Iterable[str]) -> Choice:
        entry = entry if isinstance(entry, dict) else {}
        message = entry.get("message")
        text = message.get("content") if isinstance(message, dict) else entry.get("text")
        finish = entry.get("finish_reason")
        if text is None and finish in CUT:  # all its tokens went into hidden reasoning, or a filter took them
            return Choice("", "length")
        if not isinstance(text, str) or finish in BROKEN:
            raise _Failed(f"a choice is no text but {self._quote(entry)}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _Failed("a choice has half a character (a lone surrogate) in it")
        # Some servers leave the stop string in, or never heard of it.
        text, stopped = cut_at_first(text, stop)
        return Choice(text, "length" if finish in CUT and not stopped else "stop")

    # -- the client, its key, and words about what went wrong

    def _client(self) -> Any:
        client = of_extra("openai", "an endpoint needs the openai client: pip install 'rrhf[endpoint]'").AsyncOpenAI
        # A client wants some key, and a server without one ignores it. The time-out is ours, over the whole request.
        return client(base_url=self.settings.url, api_key=self._key() or "none", max_retries=0, timeout=None)

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

    def _error(self, failed: _Failed, where: str, of_record: bool = False) -> RequestRefused:
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
        if of_record and failed.status in OF_THE_REQUEST:
            cure = "shorten or take out the record, or ask a model that takes it"
        return self._refused(failed, f"{where}: {failed.reason}" + (f": {cure}" if cure else ""))

    def _refused(self, failed: _Failed, message: str) -> RequestRefused:
        refused = RequestRefused(message)
        refused.status = failed.status
        return refused


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
        except (TypeError, ValueError, LookupError, ArithmeticError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def _error_message(body: Any) -> str:
    """What an error's body says: ``message`` or ``detail`` where it has one of them, else all of it."""
    if isinstance(body, dict):
        message = body.get("message") or body.get("detail") or body.get("error")
        return message if isinstance(message, str) else json.dumps(message or body, ensure_ascii=False)
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
