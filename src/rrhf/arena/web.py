"""What every page of the arena has: its headers, its visitor, its forms, its templates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jinja2
import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rrhf.arena.access import OWNER, form_mark, mark_fits
from rrhf.arena.database import name_of
from rrhf.arena.limits import Limiter
from rrhf.arena.store import Rater, Study, find_rater, is_owner

log = logging.getLogger("rrhf")

PAGES = Path(__file__).parent / "pages"
LARGEST_FORM = 64 * 1024  # bytes
WEEKS = 60 * 60 * 24 * 7

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer browsers send forms with the origin "null"
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "x-robots-tag": "noindex, nofollow",
}

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(PAGES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip


class SafeHeaders:
    """Puts ``HEADERS`` on every answer; pages are not kept by browsers: who goes back sees what is stored now."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                fixed = scope["path"].startswith("/static/")
                headers["cache-control"] = "private, max-age=300" if fixed else "no-store"
            await send(message)

        await self.app(scope, receive, with_headers)


# --- visitors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visitor:
    """Whose link it is; ``rater`` is None for the owner. ``mark`` is what this visitor's forms bring back."""

    rater: Rater | None
    mark: str


class Door:
    """Finds out who asks, by the cookie that the personal link has set."""

    def __init__(self, study: Study, limiter: Limiter) -> None:
        self.study, self.limiter = study, limiter
        self._suffix = form_mark(study.key, "cookie")[:8]

    def cookie(self, kind: str) -> str:
        """The cookie's name: browsers share cookies between the ports of a host, where several studies can stand."""
        return f"{kind}-{self._suffix}"

    def enter(self, request: Request, kind: str) -> Response:
        """Follow a personal link: set the cookie and leave the link, so that no page's address has the secret.

        Raises:
            HTTPException: the link is not valid.
        """
        token = request.path_params["token"]
        self.visitor(request, kind, token)
        answer = RedirectResponse("/owner" if kind == OWNER else "/rate", 303)
        secure = urlsplit(self.study.url).scheme == "https"
        # Lax: links in mail and chats come from another site.
        answer.set_cookie(self.cookie(kind), token, max_age=26 * WEEKS, httponly=True, samesite="lax", secure=secure)
        return answer

    def visitor(self, request: Request, kind: str, token: str | None = None) -> Visitor:
        """The rater or the owner who asks.

        Raises:
            HTTPException: nobody with a valid link (403), or too many requests (429).
        """
        token = request.cookies.get(self.cookie(kind), "") if token is None else token
        rater = find_rater(self.study, token) if kind != OWNER else None
        if rater is None and not (kind == OWNER and is_owner(self.study, token)):
            address = request.client.host if request.client else ""
            if not self.limiter.allows_stranger(address):
                raise HTTPException(429, "Too many tries. Wait a minute, then open your personal link again.")
            raise HTTPException(403, NO_LINK)
        if not self.limiter.allows(f"{kind}/{rater.id if rater else 0}"):
            raise HTTPException(429, "That was too fast. Nothing is lost: wait a minute, then reload this page.")
        return Visitor(rater, form_mark(self.study.key, token))

    def _is_ours(self, origin: str, request: Request) -> bool:
        """Whether a form's origin is a page of this study: at the host that was asked, or, behind a proxy that asks
        for itself, at the study's own address."""
        try:
            return urlsplit(origin).netloc in (request.headers.get("host"), urlsplit(self.study.url).netloc)
        except ValueError:
            return False

    async def form(self, request: Request, kind: str) -> tuple[Visitor, dict[str, str]]:
        """The visitor and the fields of a form that was sent from a page of this visitor's.

        Raises:
            HTTPException: as ``visitor``; or the form is too large (413), or comes from elsewhere (403).
        """
        visitor = await run_in_threadpool(self.visitor, request, kind)
        origin = request.headers.get("origin")
        if origin is not None and not self._is_ours(origin, request):
            raise HTTPException(403, FOREIGN)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_FORM:
                raise HTTPException(413, "The remark is too long. Go back and shorten it.")
        try:
            parsed = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=1000)
        except ValueError as error:
            raise HTTPException(400, FOREIGN) from error
        fields = {name: values[-1] for name, values in parsed.items()}
        if not mark_fits(fields.get("mark", ""), self.study.key, request.cookies.get(self.cookie(kind), "")):
            raise HTTPException(403, FOREIGN)
        return visitor, fields


NO_LINK = (
    "This page opens by a personal link. Open the one that you were sent; if it no longer works, it was replaced or "
    "revoked, and whoever runs the study can send you a new one."
)
NO_STORE = (
    "The study cannot be read or written right now, so this was not stored. What was stored before is kept. Go back "
    "and send it again in a while, or tell whoever runs the study."
)
FOREIGN = "This form was not sent from your own page of this study. Open your personal link again, then answer."


# --- pages --------------------------------------------------------------------------------------------------------


def page(name: str, study: Study, status: int = 200, **values: Any) -> HTMLResponse:
    """A page from its template; what it is given is escaped."""
    text = TEMPLATES.get_template(name).render(study=study.settings, **values)
    return HTMLResponse(text.encode("utf-8", "replace"), status)


def fault_page(study: Study) -> Callable[[Request, Exception], Response]:
    """The handler of what a visitor must be told."""

    def handler(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            told = {404: "There is no such page.", 405: "There is no such page."}
            return page("fault.html.j2", study, error.status_code, text=told.get(error.status_code, error.detail))
        if isinstance(error, sa.exc.DBAPIError):
            log.error(f"{name_of(study.place)}: {error.orig}: see that its disk has room and its server runs")
            return page("fault.html.j2", study, 503, text=NO_STORE)
        return page("fault.html.j2", study, 500, text="A fault of ours. Answers that were stored are kept.")

    return handler
