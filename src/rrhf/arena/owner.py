"""The owner's page: how far each rater is, what the votes say so far, and the links."""

from __future__ import annotations

import math
import threading
import time

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from rrhf.arena.access import OWNER
from rrhf.arena.results import live_results
from rrhf.arena.results_text import Table, live_tables
from rrhf.arena.store import Progress, Study, new_link, progress, rankings, revoke_link, votes
from rrhf.arena.urls import link
from rrhf.arena.web import Door, Visitor, page


class Owner:
    """The routes of the owner. ``door`` has the study."""

    def __init__(self, door: Door) -> None:
        self.door, self.study = door, door.study
        self.turn, self.made = threading.Lock(), -math.inf

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
            tables=self._tables(),
        )  # fmt: skip

    def _tables(self) -> object:
        """The results, at most 15 seconds old: raters do not wait for an owner's bootstraps."""
        with self.turn:
            if time.monotonic() - self.made > 15:
                self.tables, self.made = tables(self.study), time.monotonic()
            return self.tables

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


def tables(study: Study) -> list[Table]:
    """Title, header and rows of what the votes say so far; attention checks and skipped pairs do not count."""
    return live_tables(live_results(votes(study), rankings(study), systems=study.systems))
