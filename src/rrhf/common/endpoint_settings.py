"""Where an OpenAI-compatible server is, and how much may be asked of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from rrhf.common.errors import UserError, nearest
from rrhf.common.launch import rank_and_world

KINDS = ("chat", "completions")


@dataclass(frozen=True, kw_only=True)
class EndpointLimits:
    """What all endpoints of a command share: how they are asked, and what they may cost."""

    concurrency: int = field(default=8, metadata={"help": "requests to a server at the same time"})
    timeout: float = field(default=300.0, metadata={"help": "seconds for one request, from first byte to last"})
    max_retries: int = field(default=8, metadata={"help": "tries after a first one that failed"})
    max_requests: int | None = field(
        default=None,
        metadata={"help": "budget: most requests of a server source, by all processes together, failed ones counted"},
    )
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "budget: most tokens of a server source, prompts and responses, by all processes together"},
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "the environment variable that holds the server's key"}
    )

    def __post_init__(self) -> None:
        faults = self._faults()
        if faults:
            raise UserError("\n".join(faults))

    def _faults(self) -> list[str]:
        faults = []
        for name, least in (("concurrency", 1), ("max_retries", 0), ("max_requests", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                faults.append(f"endpoint {name} {value}: must be at least {least}")
        if not self.timeout > 0:
            faults.append(f"endpoint timeout {self.timeout}: must be above 0 seconds")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            # Not shown: it may be the key itself.
            faults.append("endpoint api_key_env: give the name of an environment variable, not the key")
        return faults


@dataclass(frozen=True)
class EndpointSettings(EndpointLimits):
    """One endpoint: its address, how it is asked, and the limits. A trailing slash of ``url`` is dropped."""

    url: str = field(metadata={"help": "the API's root, such as http://localhost:8000/v1"})
    kind: str = field(default="chat", metadata={"help": f"one of {', '.join(KINDS)}"})
    model: str | None = field(default=None, metadata={"help": "the model's name there; default: its only one"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def _faults(self) -> list[str]:
        faults = _url_faults(self.url)
        if self.kind not in KINDS:
            faults.append(f"endpoint kind {self.kind}: {nearest(self.kind, KINDS)}")
        return faults + super()._faults()


def _url_faults(url: str) -> list[str]:
    try:
        parts = urlsplit(url)
        secret = bool(parts.username or parts.password or parts.query or parts.fragment)
    except ValueError:
        return ["the endpoint's URL cannot be read: write it like http://localhost:8000/v1"]
    if secret:
        return ["the endpoint's URL has a user, a password or a query in it: keys come from the environment only"]
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return [f"endpoint {url}: not an http address: write it like http://localhost:8000/v1"]
    if parts.path.rstrip("/").endswith("/completions"):
        return [f"endpoint {url}: give the API's root, such as http://localhost:8000/v1, and the kind apart"]
    return []


def share_of_process(limits: EndpointLimits) -> EndpointLimits:
    """``limits`` with this process's share of the budgets and of the requests at a time.

    Raises:
        UserError: a budget is less than one for each process.
    """
    rank, world = rank_and_world()

    def share(name: str) -> int | None:
        budget: int | None = getattr(limits, name)
        if budget is None:
            return None
        if budget < world:
            raise UserError(f"--{name} {budget} is less than one for each of {world} processes")
        return (budget + rank) // world

    return replace(
        limits,
        concurrency=max(limits.concurrency // world, 1),
        max_requests=share("max_requests"),
        max_tokens=share("max_tokens"),
    )
