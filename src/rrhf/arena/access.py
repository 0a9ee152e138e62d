"""Who may see a page: personal links whose secret is kept as a hash alone, and the mark that each form carries."""

from __future__ import annotations

import hashlib
import hmac
import secrets

OWNER = "owner"


def new_token(name: str) -> tuple[str, str]:
    """A new personal token and what is kept of it.

    ``name`` finds the person and is no secret; what follows the dot has 256 bits of the system's randomness.
    """
    secret = secrets.token_urlsafe(32)
    return f"{name}.{secret}", _hash(secret)


def split_token(token: str) -> tuple[str, str]:
    """Name and secret of a token; empty where it is none."""
    name, _, secret = token.partition(".")
    return name, secret


def fits(secret: str, kept: str | None) -> bool:
    """Whether ``secret`` is the one whose hash was kept; takes as long for every wrong one, and for nobody's."""
    return hmac.compare_digest(_hash(secret), kept or _hash("")) and kept is not None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def form_mark(key: str, token: str) -> str:
    """What a form must bring back: it depends on the study's key and on whose page it stands (against CSRF)."""
    return hmac.new(key.encode(), token.encode("utf-8", "surrogatepass"), "sha256").hexdigest()


def mark_fits(given: str, key: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), form_mark(key, token).encode())
