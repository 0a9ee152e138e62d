"""What ``make audit`` makes of what pip-audit says: silence is never taken for a clean answer."""

from __future__ import annotations

import json

import pytest

from security.audit import verdict

SKIPPED = {"name": "a", "skip_reason": "Dependency not found on PyPI and could not be audited: a (1)"}
SOUND = {"name": "b", "version": "2", "vulns": []}
HOLED = {"name": "c", "version": "3", "vulns": [{"id": "X-1", "fix_versions": ["4"]}]}


@pytest.mark.parametrize("said", ["", "{}", json.dumps({"dependencies": []}), json.dumps({"dependencies": [SKIPPED]})])
def test_nobody_answers(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mirror that knows packages and no advisories skips every one of them: nothing was asked."""
    assert verdict(said, "no route\n", release=False) == 0
    assert verdict(said, "no route\n", release=True) == 1
    out = capsys.readouterr().out
    assert out.count("cannot be reached") == 2 and "0 known holes" not in out


def test_somebody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(json.dumps({"dependencies": [SKIPPED, SOUND]}), "", release=True) == 0
    assert "1 packages asked about, 0 known holes; not asked about: a" in capsys.readouterr().out
    assert verdict(json.dumps({"dependencies": [SOUND, HOLED]}), "", release=False) == 1
    assert "c 3: X-1; mended in: 4" in capsys.readouterr().out
