"""How a source is written: MODEL@POLICY:N, URL@chat:N, vllm:MODEL@POLICY:N, openvino:FOLDER@POLICY:N, or a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rrhf.common.endpoint_settings import KINDS
from rrhf.common.errors import UserError, nearest
from rrhf.common.remote import is_url
from rrhf.sampling.settings import policy_named

ENGINES = ("vllm", "openvino")  # written before the name of the model they load


@dataclass(frozen=True)
class SourceSpec:
    """A source as it is written. ``kind`` is "local", "endpoint", "file" or of ``ENGINES``.

    ``tag`` names it in ``sources``; ``policy`` is an endpoint's kind, chat or completions, where it is one.
    """

    kind: str
    name: str
    policy: str
    count: int
    tag: str


def parse_source(text: str) -> SourceSpec:
    """Read one ``--source``.

    Raises:
        UserError: neither a file nor of the form NAME@POLICY:N, an unknown policy, or N below 1.
    """
    if is_url(text) and not re.match(r"https?://", text) and "@" not in text:
        return SourceSpec("file", text, "file", 0, Path(text).name.split(".")[0])
    if _is_file(text):
        return SourceSpec("file", text, "file", 0, Path(text).name.split(".")[0])
    shown = shown_source(text)
    name, at, rest = text.rpartition("@")
    if not at:
        raise UserError(f"--source {shown}: no such file; a model is written MODEL@POLICY:N, a server URL@chat:N")
    policy, _, number = rest.rpartition(":")  # a policy may be pkg.module:function
    if not re.fullmatch(r"[0-9]{1,9}", number):
        policy, number = rest.removesuffix(":"), ""
    kind = "endpoint" if re.match(r"https?://", name) else "local"
    for engine in ENGINES:
        if name.startswith(f"{engine}:"):
            kind, name = engine, name.removeprefix(f"{engine}:")
    try:
        if kind != "endpoint":
            policy_named(policy)
        elif policy not in KINDS:
            raise UserError(nearest(policy, KINDS))
    except UserError as error:
        raise UserError(f"--source {shown}: unknown policy {policy!r}: {error}") from error
    if not number or int(number) < 1:
        raise UserError(f"--source {shown}: how many responses? write {shown.rpartition('@')[0]}@{policy}:4")
    short = re.sub(r"^https?://|^package:", "", name).rstrip("/")
    short = short.rpartition("/")[2].removesuffix(".gguf") if kind != "endpoint" else short.replace("/", "-")
    return SourceSpec(kind, name, policy, int(number), f"{short}@{policy}")


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a character that no name has
        return False


def shown_source(source: str) -> str:
    """A source for a message, without the key that someone may have put into its address."""
    return re.sub(r"//[^/]*@(?=[^@]*@)|\?[^@]*", "…", source)
