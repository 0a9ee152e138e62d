"""The raters' pages: one task at a time, forwards, or back to what was answered."""

from __future__ import annotations

import string
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from rrhf.arena.render import query_turns, text_html
from rrhf.arena.store import Answer, Assigned, Rater, answered, assigned, save_answer
from rrhf.arena.web import Door, Visitor, page

RATER = "rater"  # what kind of link and cookie
CHOICES = {"left": "Left", "tie": "Tie", "right": "Right", "skip": "Skip"}
KEYS = {"left": "1", "tie": "2", "right": "3", "skip": "s"}
LONGEST_REMARK = 2000
KEYS_COOKIE = "keys"  # turns the keys off


class Rating:
    """The routes of raters. ``door`` has the study."""

    def __init__(self, door: Door) -> None:
        self.door, self.study = door, door.study

    def routes(self) -> list[Route]:
        return [
            Route("/", self.home),
            Route("/r/{token}", self.enter),
            Route("/rate", self.current),
            Route("/rate/{place:int}", self.task, methods=["GET"]),
            Route("/rate/{place:int}", self.answer, methods=["POST"]),
            Route("/keys", self.keys, methods=["POST"]),
        ]

    def home(self, request: Request) -> Response:
        self.door.visitor(request, RATER)
        return RedirectResponse("/rate", 303)

    def enter(self, request: Request) -> Response:
        return self.door.enter(request, RATER)

    def current(self, request: Request) -> Response:
        """The first task without an answer, or thanks."""
        visitor = self.door.visitor(request, RATER)
        rater = _rater(visitor)
        done, count = answered(self.study, rater)
        if done < count:
            return self._task(request, visitor, done + 1, done, count)
        return page("done.html.j2", self.study, done=done, count=count)

    def task(self, request: Request) -> Response:
        """A task that was answered, or the first that was not."""
        visitor = self.door.visitor(request, RATER)
        done, count = answered(self.study, _rater(visitor))
        place = request.path_params["place"]
        if not 1 <= place <= min(done + 1, count):
            return RedirectResponse("/rate", 303)
        return self._task(request, visitor, place, done, count)

    def _task(
        self,
        request: Request,
        visitor: Visitor,
        place: int,
        done: int,
        count: int,
        warning: str = "",
        status: int = 200,
    ) -> Response:
        shown, said = assigned(self.study, _rater(visitor), place)
        keys = request.cookies.get(KEYS_COOKIE) != "off"
        return page(
            f"{self.study.settings.mode}.html.j2", self.study, status,
            place=place, done=done, count=count, mark=visitor.mark, warning=warning, task=shown.task.id,
            turns=query_turns(self.study.texts[shown.task.query].query),
            responses=[text_html(text) for text in shown.texts],
            instructions=text_html(self.study.settings.instructions),
            said=said, places=_places(shown, said), letters=string.ascii_uppercase, choices=CHOICES,
            keys=KEYS if keys else {}, longest=LONGEST_REMARK,
        )  # fmt: skip

    async def answer(self, request: Request) -> Response:
        """Keep an answer, then answer: the next task."""
        visitor, fields = await self.door.form(request, RATER)
        return await run_in_threadpool(self._answer, request, visitor, fields)

    def _answer(self, request: Request, visitor: Visitor, fields: dict[str, str]) -> Response:
        rater, place = _rater(visitor), request.path_params["place"]
        done, count = answered(self.study, rater)
        if not 1 <= place <= min(done + 1, count):
            return RedirectResponse("/rate", 303)
        shown, _ = assigned(self.study, rater, place)
        seen = fields.get("seen", "")
        if fields.get("task") != shown.task.id or not (seen.isascii() and seen.isdecimal() and len(seen) < 9):
            raise HTTPException(400, "This form does not belong to this page. Open your personal link again.")
        said, fault = self._said(fields, shown)
        if fault:
            return self._task(request, visitor, place, done, count, fault, 422)
        if not save_answer(self.study, rater, shown.task, said, int(seen)):
            return self._task(request, visitor, place, *answered(self.study, rater), ELSEWHERE, 409)
        return RedirectResponse("/rate", 303)

    def _said(self, fields: dict[str, str], shown: Assigned) -> tuple[Answer, str]:
        """The answer in a form, and what is wrong with it."""
        choice, why = fields.get("choice", ""), fields.get("why", "").replace("\r\n", "\n").strip()
        why = why.replace("\0", "\ufffd")  # PostgreSQL's texts have none
        if len(why) > LONGEST_REMARK:
            return Answer(""), f"The remark has {len(why)} of at most {LONGEST_REMARK} characters: nothing was stored."
        if self.study.settings.mode == "pairs":
            return Answer(choice, why), "" if choice in CHOICES else "Choose one of the answers."
        if choice == "skip":
            return Answer("skip", why), ""
        given = [fields.get(f"place-{index}", "") for index in range(len(shown.order))]
        possible = {str(number): number for number in range(1, len(shown.order) + 1)}
        if any(text not in possible for text in given):
            return Answer(""), "Give every response a place; equal places are ties."
        return Answer("rank", why, {name: possible[text] for name, text in zip(shown.order, given, strict=True)}), ""

    async def keys(self, request: Request) -> Response:
        """Turn the keys on or off: they are in the way of who speaks to the machine (WCAG 2.1.4)."""
        _, fields = await self.door.form(request, RATER)
        answer = RedirectResponse("/rate", 303)
        if fields.get("keys") == "off":
            answer.set_cookie(KEYS_COOKIE, "off", httponly=True, samesite="lax")
        else:
            answer.delete_cookie(KEYS_COOKIE)
        return answer


ELSEWHERE = (
    "This was answered in another tab or on another device meanwhile. What was said there is kept and shown here; "
    "choose again to change it, or go on."
)


def _rater(visitor: Visitor) -> Rater:
    assert visitor.rater is not None
    return visitor.rater


def _places(shown: Assigned, said: Answer | None) -> list[Any]:
    """Of a ranking, the place that each response was given, in the order shown."""
    ranks = (said.ranks if said else None) or {}
    return [ranks.get(name) for name in shown.order]
