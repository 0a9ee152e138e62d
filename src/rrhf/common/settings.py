"""Compare the settings of an earlier, stopped run with those of this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rrhf.common.errors import UserError


class OtherSettingsError(UserError):
    """What was begun has other settings than what was asked for."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Every name whose value changed → what it was and is, in words; a missing name counts as None."""
    names = sorted({*before, *now})
    return {
        name: f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    }


def refuse_other_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], what: str, cure: str, of: Mapping[str, object] | None = None
) -> None:
    """Refuse to go on with work that was begun with other settings.

    ``of``: settings that are a checksum → the name of what they are the checksum of, for the message.

    Raises:
        OtherSettingsError: ``before`` and ``now`` differ; the message is ``what`` (the differences): ``cure``.
    """
    names = of or {}
    changed = differences(before, now).items()
    if changed:
        words = [f"{text}, of {names[name]}" if names.get(name) else text for name, text in changed]
        raise OtherSettingsError(f"{what} ({'; '.join(words)}): {cure}")
