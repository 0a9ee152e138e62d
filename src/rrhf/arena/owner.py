"""The owner's page: how far each rater is, what the votes say so far, and the links."""

from __future__ import annotations

import importlib
import importlib.util
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from rrhf.arena.access import OWNER
from rrhf.arena.store import Progress, Study, new_link, progress, rankings, revoke_link, votes
from rrhf.arena.urls import link
from rrhf.arena.votes import Vote
from rrhf.arena.web import Door, Visitor, page
from rrhf.common.presentation import number, percent

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


class Owner:
    """The routes of the owner. ``door`` has the study."""

    def __init__(self, door: Door) -> None:
        self.door, self.study, self.live = door, door.study, Live(door.study)

    def routes(self) -> list[Route]:
        return [
            Route("/o/{token}", self.enter),
            Route("/owner", self.overview, methods=["GET"]),
            Route("/owner/links", self.links, methods=["POST"]),
        ]

    def enter(self, request: Request) -> Response:
        return self.door.enter(request, OWNER)

    def overview(self, request: Request) -> Response:
        return self._page(self.door.visitor(request, OWNER))

    def _page(self, visitor: Visitor, fresh: tuple[str, str] | None = None) -> Response:
        raters = progress(self.study)
        return page(
            "owner.html.j2", self.study,
            mark=visitor.mark, fresh=fresh, raters=raters, last={row.rater.id: _ago(row) for row in raters},
            done=sum(row.answered for row in raters), count=sum(row.assigned for row in raters),
            tables=self.live.tables(),
        )  # fmt: skip

    async def links(self, request: Request) -> Response:
        """Revoke a rater's link, or make a new one, which is shown this once."""
        visitor, fields = await self.door.form(request, OWNER)
        return await run_in_threadpool(self._links, visitor, fields)

    def _links(self, visitor: Visitor, fields: dict[str, str]) -> Response:
        raters = {str(row.rater.id): row.rater for row in progress(self.study)}
        rater = raters.get(fields.get("rater", ""))
        action = fields.get("action")
        if rater is None or action not in ("revoke", "renew"):
            raise HTTPException(400, "There is no such rater.")
        if action == "renew":
            return self._page(visitor, (rater.name, link(self.study.url, new_link(self.study, rater.name))))
        revoke_link(self.study, rater.id)
        return RedirectResponse("/owner", 303)


def _ago(row: Progress) -> str:
    if row.last is None:
        return "not yet"
    minutes = max(0, int((time.time() - row.last) / 60))
    if minutes < 60:
        return f"{minutes} min ago" if minutes else "just now"
    return f"{minutes // 60} h ago" if minutes < 48 * 60 else f"{minutes // (24 * 60)} days ago"


# --- results so far ------------------------------------------------------------------------------------------------


class Live:
    """The tables of results, at most ``FRESH`` seconds old: raters do not wait for an owner's bootstraps."""

    FRESH = 15.0

    def __init__(self, study: Study) -> None:
        self._study, self._lock = study, threading.Lock()
        self._tables: list[Table] = []
        self._made = -math.inf

    def tables(self) -> list[Table]:
        with self._lock:
            if time.monotonic() - self._made > self.FRESH:
                self._tables, self._made = live_tables(self._study), time.monotonic()
            return self._tables


def live_tables(study: Study) -> list[Table]:
    """What the votes say so far; attention checks and skipped pairs do not count.

    With intervals where the libraries of results are there, else as counts.
    """
    told, ranked = votes(study), rankings(study)
    if not ranked and not any(vote.choice != "skip" and vote.spoilt is None for vote in told):
        return []
    if importlib.util.find_spec("rrhf.arena.results") and importlib.util.find_spec("choix"):
        found = importlib.import_module("rrhf.arena.results").live_results(told, ranked, systems=study.systems)
        return [_compared(found["comparisons"]), _strengths(found["strengths"])]
    return [counts(told)] if told else []


def _compared(found: Sequence[Mapping[str, Any]]) -> Table:
    header = ["comparison", "queries", "win", "tie", "lose", "win rate, a tie is half"]
    return "Comparisons", header, [
        [
            f"{one['a']} against {one['b']}", str(one["queries"]),
            *(_share(one[f"{name}_share"]) for name in ("win", "tie", "lose")), _share(one["win_rate"]),
        ]
        for one in found
    ]  # fmt: skip


def _share(one: Mapping[str, float]) -> str:
    return f"{percent(one['mean'])} ({100 * one['low']:.0f}–{100 * one['high']:.0f})"


def _strengths(found: Mapping[str, Mapping[str, float]]) -> Table:
    rows = [
        [name, *(number(one[end], 2, sign=True) for end in ("mean", "low", "high"))]
        for name, one in sorted(found.items(), key=lambda item: -item[1]["mean"])
    ]
    return "Bradley–Terry strengths", ["system", "strength", "95 % from", "to"], rows


def counts(told: Sequence[Vote]) -> Table:
    """Win, tie and lose of each comparison, without intervals."""
    said: dict[tuple[str, str], Counter[str]] = {}
    for vote in told:
        if vote.spoilt is None and vote.choice != "skip":
            a, b = sorted((vote.left, vote.right))
            better = {"left": vote.left, "right": vote.right}.get(vote.choice)
            said.setdefault((a, b), Counter())["tie" if better is None else "win" if better == a else "lose"] += 1
    rows = [
        [
            f"{a} against {b}", str(one.total()),
            *(f"{one[name]} ({percent(one[name] / one.total())})" for name in ("win", "tie", "lose")),
        ]
        for (a, b), one in sorted(said.items())
    ]  # fmt: skip
    return "Votes by comparison", ["comparison", "votes", "win", "tie", "lose"], rows
