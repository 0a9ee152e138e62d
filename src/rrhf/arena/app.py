"""The arena's pages as one application, and the server that carries it."""

from __future__ import annotations

import socket

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from rrhf.arena.limits import Limiter
from rrhf.arena.owner import Owner
from rrhf.arena.rating import Rating
from rrhf.arena.settings import LimitSettings
from rrhf.arena.store import Study
from rrhf.arena.urls import LOOPBACK, host_of
from rrhf.arena.web import PAGES, Door, SafeHeaders, fault_page
from rrhf.common.errors import UserError


def application(study: Study, limits: LimitSettings) -> Starlette:
    """The pages of an open study. Requests for another host than the study's are refused (DNS rebinding)."""
    door = Door(study, Limiter(limits))
    told = fault_page(study)
    return Starlette(
        routes=[
            *Rating(door).routes(),
            *Owner(door).routes(),
            Mount("/static", StaticFiles(directory=PAGES / "static")),
        ],
        middleware=[
            Middleware(SafeHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]", host_of(study.url)]),
        ],
        exception_handlers={HTTPException: told, Exception: told},
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on.

    Raises:
        UserError: the place is taken, or none of this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
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
