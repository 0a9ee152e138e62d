"""A judge at work: it is asked about all responses of a query in one call, and asked again where it cannot be read."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rrhf.common.endpoint import (
    OF_THE_REQUEST,
    PROMPT_OVERHEAD,
    Choice,
    EndpointClient,
    Question,
    RequestRefused,
)
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.common.journal import Journal
from rrhf.rewards.judges.parse import Refusal, Scores, parse_reply
from rrhf.rewards.judges.template import JudgeTemplate
from rrhf.sampling.sources.server import request_seed

log = logging.getLogger("rrhf")

ENUMERATED = 20  # a range of whole numbers up to this wide is a list of values in the schema
FRACTIONS = 2  # a range narrower than this has too few whole numbers to be meant by them alone
BYTES_PER_TOKEN = 4  # of English prose; an estimate
HOPELESS = 20  # calls without one that could be scored, after which a judge is not asked further
REFUSED = "refused"  # the finish of a request that the server would not take
CUT = "cut by the limit of its tokens"


class Call(NamedTuple):
    """All that a judge is asked at once.

    Attributes:
        id: names it in messages and seeds; of two calls with one id the texts differ.
        query: what was asked of the policies.
        responses: to be scored.
        order: the indices of ``responses`` in the order in which the judge reads them.
    """

    id: str
    query: str
    responses: tuple[str, ...]
    order: tuple[int, ...]


def shuffled(seed: int, call_id: str, number: int) -> tuple[int, ...]:
    """An order of ``number`` responses that the seed and the id decide alone."""

    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{index}/{call_id}".encode("utf-8", "replace"), digest_size=16).digest()

    return tuple(sorted(range(number), key=key))


def answer_schema(template: JudgeTemplate, number: int) -> dict[str, Any]:
    """``response_format`` for a reply with every score: an object a response, with a value an aspect."""
    low, high = template.range
    whole = low == int(low) and high == int(high)
    value: dict[str, Any] = {"type": "number", "minimum": low, "maximum": high}
    if whole and (template.integers or high - low >= FRACTIONS) and high - low <= ENUMERATED:
        value = {"type": "integer", "enum": list(range(int(low), int(high) + 1))}
    elif whole and template.integers:
        value = {"type": "integer", "minimum": int(low), "maximum": int(high)}
    scores = _object(dict.fromkeys(template.aspects, value))
    schema = _object({f"Response {place}": scores for place in range(1, number + 1)})
    return {"type": "json_schema", "json_schema": {"name": "scores", "strict": True, "schema": schema}}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


class Judge:
    """A server that scores responses, with all its replies in a journal.

    Args:
        template: what it is asked.
        limits: how it is asked, and what it may cost.
        folder: where the journal of replies lies; None: replies are kept in memory only.
        seed: of the requests and the frames.
        sleep: waits the given seconds between tries.

    ``counts`` holds what happened: calls, replies that were asked for or taken from the journal, refusals by reason.
    A request that the server refused stands in the journal as well, and is made again where the template has more
    ``tries`` than then.
    """

    def __init__(
        self,
        template: JudgeTemplate,
        limits: EndpointLimits | None = None,
        folder: Path | None = None,
        seed: int = 0,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self.template, self.seed = template, seed
        self.client = EndpointClient(template.endpoint(limits or EndpointLimits()), sleep)
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self._folder = folder
        self._journal: Journal | None = None
        self._replies: dict[str, Choice] = {}
        self._refused_before: set[str] = set()  # requests, by the journal
        self._refused_now: dict[str, RequestRefused] = {}  # they are to be written into it
        self._takes_schema: bool | None = False if template.json == "never" or template.kind != "chat" else None
        if template.model is not None:
            self._open_journal()

    def scores(self, calls: Sequence[Call]) -> list[Scores | None]:
        """One ``Scores`` a call, in the order of its responses; None where no reply could be read in all tries.

        Every reply is in the journal before it is read. A call whose reply stands there costs nothing. One that the
        server will not take (HTTP 400: too long, or filtered) has no scores, and is not asked again.

        Raises:
            UserError: the server is down, or a request failed for good, or of the first ``HOPELESS`` calls none could
                be scored; what was answered is kept.
            BudgetReached: the next request could exceed the budget.
        """
        found: list[Scores | None] = [None] * len(calls)
        self.counts["calls"] += len(calls)
        left = list(range(len(calls)))
        for attempt in range(self.template.tries):
            if not left:
                break
            replies = self._replies_to([calls[index] for index in left], attempt)
            still = []
            for index, choice in zip(left, replies, strict=True):
                read = self._read(choice, calls[index])
                if read is None and choice.finish != REFUSED:
                    still.append(index)
                found[index] = read
            left = still
            self._refuse_hopeless()
        if self.counts["replies read"]:  # else the fault may be the server's, and not the records'
            self._keep_refused()
        self.counts["calls without a score"] += found.count(None)
        return found

    def _refuse_hopeless(self) -> None:
        """Stop where nothing that was asked for so far could be read: all that follows would be paid for in vain."""
        if self.counts["replies read"] or self.counts["calls"] < HOPELESS:
            return
        (reason, _), *_ = self.refusals.most_common(1)
        cure = "look at the replies: the model does not do what the prompt asks"
        if reason == CUT:
            cure = f"raise max_tokens, which is {self.template.max_tokens}, or shorten what the judge is to say"
        elif reason.startswith(REFUSED):
            cure = "shorten the records, or ask a judge that takes them (this one again where tries is raised)"
        journal = f"; they are kept in {self._journal.path}" if self._journal is not None else ""
        raise UserError(
            f"{self.template.url}: none of the first {self.counts['calls']} calls could be scored: {reason}: "
            f"{cure}{journal}"
        )

    def _read(self, choice: Choice, call: Call) -> Scores | None:
        """The scores in a reply, in the order of the call's responses."""
        read: Scores | Refusal = Refusal(f"{REFUSED} by the server: {choice.text}" if choice.finish == REFUSED else CUT)
        if choice.finish == "stop":
            read = parse_reply(choice.text, self.template.scale, len(call.responses))
        if isinstance(read, Refusal):
            self.counts["replies refused"] += 1
            self.refusals[re.sub(r"^response \d+: |'.*'", "", read.reason).strip()] += 1
            log.debug("%s: refused: %s", call.id, read.reason)
            return None
        self.counts["replies read"] += 1
        return [read[call.order.index(index)] for index in range(len(call.responses))]

    # -- replies, from the journal or the server

    def _replies_to(self, calls: Sequence[Call], attempt: int) -> list[Choice]:
        if self._journal is None and self._folder is not None:
            self._prepare()  # the journal's name depends on the model's, which the server tells
        keys = [self._key(call, attempt) for call in calls]
        if any(key not in self._replies for key in keys):
            if not self.client.checked:
                self._prepare()
                keys = [self._key(call, attempt) for call in calls]  # now it is known whether it takes a schema
            wanted = {key: call for key, call in zip(keys, calls) if key not in self._replies}
            names = list(wanted)

            def refused(index: int, error: RequestRefused) -> None:
                log.warning(f"{error}; it has no score")
                self._replies[names[index]] = Choice(f"HTTP {error.status}", REFUSED)
                self._refused_now[names[index]] = error

            questions = [Question(call.id, partial(self._body, call, attempt)) for call in wanted.values()]
            for index, choices in self.client.ask(questions, refused):
                self._keep(names[index], choices[0])
                self.counts["replies asked for"] += 1
        self._say_refused_before(keys)
        return [self._replies[key] for key in keys]

    def _prepare(self) -> None:
        """Learn the model's name and whether the server takes a schema, each by a request for one token."""
        if not self.client.checked:
            self._probe(schema=False)
        if self._journal is None:
            self._open_journal()
        if self._takes_schema is None:
            taken = True
            try:
                self._probe(schema=True)
            except RequestRefused as error:
                if error.status not in OF_THE_REQUEST:  # a failure that may pass says nothing of schemas
                    hint = "asked with a JSON schema; `json: never` in the judge's file asks without"
                    raise UserError(f"{error} ({hint})") from error
                self._probe(schema=False)  # the server is still there: it is the schema that it refuses
                log.info("%s takes no JSON schema, and is asked in words alone: %s", self.template.url, error)
                taken = False
            self._takes_schema = taken
            self._note({"schema": taken})

    def _probe(self, schema: bool) -> None:
        probe = Call("check", "Hi", ("Hello",), (0,))
        known, self._takes_schema = self._takes_schema, schema
        try:
            self.client.check(partial(self._body, probe, 0, tokens=1))
        finally:
            self._takes_schema = known

    def _open_journal(self) -> None:
        if self._folder is None:
            return
        made_of = json.dumps(["judge", self.template.url, self.template.kind, self.client.model])
        self._journal = Journal(self._folder, made_of)
        for entry in self._journal.read():
            if isinstance(entry.get("schema"), bool) and self._takes_schema is None:
                self._takes_schema = entry["schema"]
            if not isinstance(asked := entry.get("asked"), str):
                continue
            if isinstance(entry.get("text"), str):
                self._replies[asked] = Choice(entry["text"], str(entry.get("finish", "stop")))
            elif isinstance(entry.get("refused"), str) and entry.get("tries", 0) >= self.template.tries:
                self._replies[asked] = Choice(entry["refused"], REFUSED)
                self._refused_before.add(asked)

    def _keep(self, key: str, choice: Choice) -> None:
        self._replies[key] = choice
        self._note({"asked": key, "text": choice.text, "finish": choice.finish})

    def _keep_refused(self) -> None:
        """Note what the server refused and why, to hold until the template has more tries."""
        for key, error in self._refused_now.items():
            entry = {"asked": key, "refused": self._replies[key].text, "why": str(error), "tries": self.template.tries}
            self._note(entry)
        self._refused_now.clear()

    def _say_refused_before(self, keys: Sequence[str]) -> None:
        if found := self._refused_before.intersection(keys):
            self._refused_before -= found
            log.warning(
                f"{self.template.url}: {len(found)} requests are not made again that the server refused before, and "
                "have no score: raise tries in the judge's file to make them"
            )

    def _note(self, entry: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.add(entry)

    def _key(self, call: Call, attempt: int) -> str:
        """A digest of all that is asked."""
        body = json.dumps(self._body(call, attempt), sort_keys=True)
        return hashlib.sha256(body.encode("utf-8", "replace")).hexdigest()

    def _body(
        self, call: Call, attempt: int, first: int = 0, number: int = 1, tokens: int | None = None
    ) -> dict[str, Any]:
        template = self.template
        prompt = template.asked(call.query, [call.responses[index] for index in call.order], self.seed)
        body: dict[str, Any] = {
            "max_tokens": tokens or template.max_tokens,
            "temperature": template.retry_temperature if attempt else template.temperature,
            "seed": request_seed(self.seed, call.id, attempt),
        }
        if template.kind == "completions":
            return {"prompt": prompt, **body}
        system = [{"role": "system", "content": template.system}] if template.system else []
        body["messages"] = [*system, {"role": "user", "content": prompt}]
        if self._takes_schema:
            body["response_format"] = answer_schema(template, len(call.responses))
        return body

    # -- what it would cost

    def estimate(self, calls: Iterable[Call]) -> dict[str, float | None]:
        """What ``scores(calls)`` would ask for, without asking.

        Returns:
            calls; cached (what the journal has needs no request); prompt_tokens (estimated) and reply_tokens (at most)
            where each of the others is read at once; their cost in dollars; and most, the cost where each is refused
            as long as it is asked again. Both costs are None without a price.
        """
        number = cached = prompt = replies = 0
        cost = most = 0.0
        price = self.template.price or (0.0, 0.0)
        for call in calls:
            number += 1
            left = self._tries_left(call)
            if not left:
                cached += 1
                continue
            body = self._body(call, 0)
            text = body.get("prompt") or "".join(message["content"] for message in body["messages"])
            asked = len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN + PROMPT_OVERHEAD
            once = (asked * price[0] + self.template.max_tokens * price[1]) / 1e6
            prompt, replies = prompt + asked, replies + self.template.max_tokens
            cost, most = cost + once, most + left * once
        return {
            "calls": number, "cached": cached, "prompt_tokens": prompt, "reply_tokens": replies,
            "cost": None if self.template.price is None else cost,
            "most": None if self.template.price is None else most,
        }  # fmt: skip

    def _tries_left(self, call: Call) -> int:
        """How often a call may still be asked: 0 where the journal has a reply that can be read, or all tries."""
        for attempt in range(self.template.tries):
            choice = self._replies.get(self._key(call, attempt))
            if choice is None:
                return self.template.tries - attempt
            if choice.finish == REFUSED:
                return 0
            if choice.finish == "stop":
                read = parse_reply(choice.text, self.template.scale, len(call.responses))
                if not isinstance(read, Refusal):
                    return 0
        return 0

    def summary(self, asked_for: bool = True) -> str:
        """What happened, in a sentence; without ``asked_for`` it is the same for a call that went on from a journal."""
        counts = self.counts
        asked, calls = counts["replies asked for"], counts["calls"]
        read = counts["replies read"]
        words = f"{read} of {calls} calls scored (" + (f"{asked} replies asked for, " if asked_for else "")
        words += f"{counts['replies refused']} {'' if asked_for else 'replies '}refused"
        reasons = ", ".join(f"{number} {reason}" for reason, number in self.refusals.most_common(5))
        return f"{words}{': ' + reasons if reasons else ''})"


def calls_of(items: Iterable[tuple[str, str, Sequence[str]]], template: JudgeTemplate, seed: int) -> Iterator[Call]:
    """Calls of (id, query, responses), in the template's order."""
    for call_id, query, responses in items:
        given = tuple(range(len(responses)))
        order = shuffled(seed, call_id, len(responses)) if template.order == "shuffled" else given
        yield Call(call_id, query, tuple(responses), order)
