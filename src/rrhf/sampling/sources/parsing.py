"""How a source is written: MODEL@POLICY:N, URL@chat:N, vllm:MODEL@POLICY:N, openvino:FOLDER@POLICY:N, or a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rrhf.common.errors import UserError, nearest
from rrhf.sampling.settings import POLICY_NAMES
from rrhf.sampling.sources.server import KINDS

ENGINES = ("vllm", "openvino")  # written before the name of the model they load


@dataclass(frozen=True)
class Source:
    """One parsed source. ``kind`` is "local", "endpoint", "file" or of ``ENGINES``; ``tag`` names it in ``sources``."""

    kind: str
    name: str
    policy: str
    count: int
    tag: str


def parse_source(text: str) -> Source:
    """Read one ``--source``.

    Raises:
        UserError: neither a file nor of the form NAME@POLICY:N, an unknown policy, or N below 1.
    """
    if Path(text).is_file():
        return Source("file", text, "file", 0, Path(text).name.split(".")[0])
    shown = shown_source(text)
    name, at, rest = text.rpartition("@")
    if not at:
        raise UserError(f"--source {shown}: no such file; a model is written MODEL@POLICY:N, a server URL@chat:N")
    policy, colon, number = rest.partition(":")
    kind = "endpoint" if re.match(r"https?://", name) else "local"
    for engine in ENGINES:
        if name.startswith(f"{engine}:"):
            kind, name = engine, name.removeprefix(f"{engine}:")
    known = KINDS if kind == "endpoint" else POLICY_NAMES
    if policy not in known:
        raise UserError(f"--source {shown}: unknown policy {policy!r}: {nearest(policy, known)}")
    if not colon or not number.isdigit() or int(number) < 1:
        raise UserError(f"--source {shown}: how many responses? write {shown.rpartition('@')[0]}@{policy}:4")
    short = re.sub(r"^https?://|^package:", "", name).rstrip("/")
    short = short.rpartition("/")[2].removesuffix(".gguf") if kind != "endpoint" else short.replace("/", "-")
    return Source(kind, name, policy, int(number), f"{short}@{policy}")


def shown_source(source: str) -> str:
    """A source for a message, without the key that someone may have put into its address."""
    return re.sub(r"//[^/]*@(?=[^@]*@)|\?[^@]*", "…", source)
