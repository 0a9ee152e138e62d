"""The addresses of the pages."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from rrhf.arena.access import OWNER, split_token
from rrhf.common.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def site(url: str) -> str:
    """The address of a site without a slash at its end.

    Raises:
        UserError: it is no address of a site.
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        raise UserError(f"--url {url}: write http://HOST:PORT or https://HOST, with no path")
    return f"{parts.scheme}://{parts.netloc}"


def host_of(url: str) -> str:
    """The host's name alone, without its port; an address of IPv6 in brackets, as requests name it."""
    host = urlsplit(url).hostname or ""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def link(url: str, token: str) -> str:
    """A personal link."""
    return f"{url}/{'o' if split_token(token)[0] == OWNER else 'r'}/{token}"
