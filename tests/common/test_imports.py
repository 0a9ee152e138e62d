from __future__ import annotations

import sys

import pytest

from rrhf.common.errors import UserError
from rrhf.common.imports import of_extra


def test_a_module_of_an_extra_is_imported_and_a_missing_one_says_how_to_install_it(monkeypatch):
    assert of_extra("json.decoder", "json is missing").JSONDecoder().decode("[1]") == [1]
    monkeypatch.setitem(sys.modules, "choix", None)
    with pytest.raises(UserError, match=r"^ranks need choix: pip install 'rrhf\[judging\]'$"):
        of_extra("choix", "ranks need choix: pip install 'rrhf[judging]'")
