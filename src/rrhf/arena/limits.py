"""How often a person or an address may ask."""

from __future__ import annotations

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from rrhf.arena.settings import LimitSettings


class Limiter:
    """Counts in a moving window of a minute, in memory."""

    def __init__(self, settings: LimitSettings) -> None:
        self._windows = MovingWindowRateLimiter(MemoryStorage())
        self._people = RateLimitItemPerMinute(settings.requests_per_minute)
        self._strangers = RateLimitItemPerMinute(settings.strangers_per_minute)

    def allows(self, person: str) -> bool:
        """Count a request of a person whose link is valid."""
        return self._windows.hit(self._people, "person", person)

    def allows_stranger(self, address: str) -> bool:
        """Count a request without a valid link. Those with one pass, whoever else comes from their address."""
        return self._windows.hit(self._strangers, "stranger", address)
