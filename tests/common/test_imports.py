from __future__ import annotations

import sys

import pytest

from rrhf.common.errors import UserError
from rrhf.common.imports import code_digest, load_function, of_extra


def test_a_module_of_an_extra_is_imported_and_a_missing_one_says_how_to_install_it(monkeypatch):
    assert of_extra("json.decoder", "json is missing").JSONDecoder().decode("[1]") == [1]
    monkeypatch.setitem(sys.modules, "choix", None)
    with pytest.raises(UserError, match=r"^ranks need choix: pip install 'rrhf\[judging\]'$"):
        of_extra("choix", "ranks need choix: pip install 'rrhf[judging]'")


def test_what_a_function_calls_is_told_by_the_version_of_its_module(tmp_path, monkeypatch):
    code = "def helper(text):\n    return {helper}\n\n\ndef reward(prompts, completions):\n"
    code += "    return list(map(helper, completions))\n"
    monkeypatch.chdir(tmp_path)
    digests = []
    for number, (helper, version) in enumerate(
        [("1", ""), ("2", ""), ("2", "__version__ = '1'\n"), ("2", "__version__ = '2'\n")]
    ):
        (tmp_path / f"versioned{number}.py").write_text(version + code.format(helper=helper))
        digests.append(code_digest(load_function(f"versioned{number}:reward", "reward")))
    assert digests[0] == digests[1] and len(set(digests)) == 3
