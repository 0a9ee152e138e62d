"""The arena's pages as one application, and the server that carries it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

import sqlalchemy as sa
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from rrhf.arena.limits import Limiter
from rrhf.arena.owner import Owner
from rrhf.arena.rating import Rating
from rrhf.arena.settings import LimitSettings
from rrhf.arena.store import Study
from rrhf.arena.urls import LOOPBACK, host_of
from rrhf.arena.web import PAGES, Door, SafeHeaders, fault_page
from rrhf.common.errors import UserError

THREADS = 100  # votes wait for the disk in them; pages are not to wait for votes


def application(study: Study, limits: LimitSettings) -> ASGIApp:
    """The pages of an open study. Requests for another host than the study's are refused (DNS rebinding)."""
    door = Door(study, Limiter(limits))
    told = fault_page(study)

    @contextlib.asynccontextmanager
    async def with_threads(app: Starlette) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield

    pages = Starlette(
        lifespan=with_threads,
        routes=[
            *Rating(door).routes(),
            *Owner(door).routes(),
            Mount("/static", StaticFiles(directory=PAGES / "static")),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]", host_of(study.url)]),
        ],
        exception_handlers={HTTPException: told, sa.exc.DBAPIError: told, Exception: told},
    )
    return SafeHeaders(pages)  # around the page of a fault, too, which no middleware of Starlette's is


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on.

    Raises:
        UserError: the place is taken, or none of this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        place = socket.create_server((host, port), family=family, backlog=512)
        # Inherited by each connection: without it a page's body waits 40 ms until its head was acknowledged.
        place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return place
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error}): choose another") from error


def serve(study: Study, limits: LimitSettings, place: socket.socket) -> None:
    """Serve until a signal comes. No log of requests is kept: the links' secrets would stand in it."""
    import uvicorn

    config = uvicorn.Config(
        application(study, limits), access_log=False, server_header=False, log_level="warning", timeout_keep_alive=30,
        limit_concurrency=2000,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[place])
