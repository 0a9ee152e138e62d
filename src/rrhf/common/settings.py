"""Whether what an earlier, stopped run left was made with the settings of this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rrhf.common.errors import UserError


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Every name whose value changed → what it was and is, in words; a missing name counts as None."""
    names = sorted({*before, *now})
    return {
        name: f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    }


def refuse_other_settings(before: Mapping[str, Any], now: Mapping[str, Any], what: str, cure: str) -> None:
    """Raise ``UserError`` ("what (changes): cure") where the settings of before are not those of now."""
    changed = differences(before, now)
    if changed:
        raise UserError(f"{what} ({'; '.join(changed.values())}): {cure}")
