"""The help of every command: in step with the flags there are, and there without waiting for torch."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rrhf.cli.arena import ACTIONS
from rrhf.cli.baseline import BASELINES
from rrhf.cli.main import COMMANDS, main
from rrhf.cli.train import REWARD
from rrhf.common.flag_help import Flag, flags_of, format_help, settings_in_source

FAMILIES = {"arena": ACTIONS, "baseline": BASELINES}
PAGES = [name for name in COMMANDS if name not in FAMILIES]
PAGES += [f"{family} {name}" for family, names in FAMILIES.items() for name in names]
PARSED = ["sample", "score", "train", "evaluate", "reward-model"]  # the commands whose flags are settings classes

HELPS = """
import contextlib, io, json, sys
from rrhf.cli.main import main
heavy, pages = {}, {}
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    pages[command] = page.getvalue()
    heavy[command] = [name for name in ("torch", "transformers", "datasets", "matplotlib") if name in sys.modules]
print(json.dumps([heavy, pages]))
"""


@pytest.fixture(scope="module")
def shown() -> tuple[dict[str, list[str]], dict[str, str]]:
    """What heavy modules each command's help has imported, and its page."""
    ran = subprocess.run([sys.executable, "-c", HELPS, *FAMILIES, *PAGES], capture_output=True, text=True, check=True)
    heavy, pages = json.loads(ran.stdout)
    return heavy, pages


def test_no_help_waits_for_the_libraries(shown: tuple[dict[str, list[str]], dict[str, str]]) -> None:
    assert shown[0] == {command: [] for command in (*FAMILIES, *PAGES)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_lists_its_commands(family: str, shown: tuple[dict[str, list[str]], dict[str, str]]) -> None:
    assert all(f"rrhf {family} {name}" in shown[1][family] for name in FAMILIES[family])


@pytest.mark.parametrize("command", PAGES)
def test_the_help_is_grouped(command: str, shown: tuple[dict[str, list[str]], dict[str, str]]) -> None:
    page = shown[1][command]
    assert page.startswith(f"usage: rrhf {command} ")
    titles = [line for line in page.splitlines() if line.endswith(":") and not line.startswith((" ", "usage"))]
    assert titles[0] == "files:" and titles[-1] == "help:"
    assert "--output" in page or command == "inspect" or command.startswith("arena ")


def module_of(command: str) -> Any:
    return importlib.import_module(f"rrhf.cli.{command.replace('-', '_')}")


def shown_flags(command: str) -> dict[str, Flag]:
    groups = module_of(command).short_help()
    flags = [flag for group in groups.values() for flag in group]
    assert len({flag.name for flag in flags}) == len(flags)
    return {flag.name: flag for flag in flags}


@pytest.mark.parametrize("command", PARSED)
def test_the_short_help_shows_the_flags_as_they_are(command: str) -> None:
    module = module_of(command)
    real = {flag.name: flag for settings in module.flags().settings for flag in flags_of(settings)}
    page = shown_flags(command)
    assert set(page) <= set(real)
    for name, flag in page.items():
        default = getattr(real[name].default, "value", real[name].default)
        assert (flag.default or None) == (default or None), name
        assert flag.required == real[name].required or (command, name) == ("train", REWARD), name
        if flag not in getattr(module, "COMMON", []):
            assert flag.text == real[name].text != "", name


@pytest.mark.parametrize("command", PARSED)
def test_the_short_help_shows_every_flag_of_ours(command: str) -> None:
    from transformers import TrainingArguments

    module = module_of(command)
    theirs = {flag.name for flag in flags_of(TrainingArguments)}
    known = {name.removeprefix("--") for name in module.flags().known()}
    switches = {name for name in known if name.startswith("no_") and name.removeprefix("no_") in known}
    refused = set(getattr(module, "REFUSED", ()))
    assert known - theirs - switches - refused == set(shown_flags(command)) - theirs


def test_commands_that_score_what_they_sample_list_the_rewards_that_can(
    shown: tuple[dict[str, list[str]], dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["evaluate", "--model", "m", "--output", "o.json", "--data", "d"]
    assert main(evaluate) == 2
    lists = {"the error": capsys.readouterr().err}
    lists |= {name: shown[1][name] for name in ("evaluate", "train", "baseline ppo", "baseline best-of-n")}
    for where, text in lists.items():
        words = " ".join(text.split())
        assert "one of pkg.module:function, judge:FILE, logprob:MODEL, " in words, where
        assert not any(form in words for form in ("provided:NAME", "people:FILE", "source:TAG")), where
    assert "provided:NAME" in shown[1]["score"]
    assert not any(f"--{name} " in shown[1]["evaluate"] for name in ("num_responses", "reward_weights"))


def test_help_all_shows_every_training_argument(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TrainingArguments

    pages = []
    for spelling in ("--help-all", "--help_all"):
        with pytest.raises(SystemExit):
            main(["train", spelling])
        pages.append(capsys.readouterr().out)
    page = pages[0]
    assert pages[1] == page
    for flag in flags_of(TrainingArguments):
        assert f"--{flag.name} " in page, flag.name


def test_a_missing_output_of_training_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "m", "--data", "d"]) == 2
    assert "required: --output" in capsys.readouterr().err


SOURCE = '''
from __future__ import annotations
import math
import torch_that_is_not_installed as torch
from torch_that_is_not_installed import Tensor

LARGE = 2**11
TABLE: dict[str, Tensor] = {"a": 1, "b": 2}
DEVICE = torch.device("cpu")

@torch.compile
def fast(x: Tensor) -> Tensor: ...

def first(x: Tensor) -> Tensor:
    """What it does."""

@dataclass
class Settings(torch.Base):
    """Text."""
    kind: str = field(default="a", metadata={"help": f"one of {', '.join(TABLE)}: {first.__doc__}"})
    size: int | None = field(default=LARGE, metadata={"help": "at most"})
    names: list[str] = field(default_factory=lambda: ["x"], metadata={"help": "100 % of them"})
    needed: float = field(metadata={"help": "no default"})

    def method(self) -> Tensor: ...
'''


def test_a_settings_class_is_read_from_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up.py").write_text(SOURCE.replace("import math", "from dataclasses import dataclass, field"))
    monkeypatch.syspath_prepend(tmp_path)
    flags = flags_of(settings_in_source("made_up", "Settings"))
    assert flags == [
        Flag("kind", "str", "a", "one of a, b: What it does."),
        Flag("size", "int | None", 2048, "at most"),
        Flag("names", "list[str]", ["x"], "100 % of them"),
        Flag("needed", "float", None, "no default", required=True),
    ]
    page = format_help("make", "Makes.", {"what": flags})
    assert page.startswith("usage: rrhf make --needed X [flags]\n")
    for words in ("--names VALUE …", "100 % of them (default: x)", "no default (required)", "at most (default: 2048)"):
        assert words in page
    assert "made_up" not in sys.modules
    with pytest.raises(LookupError, match="no class Other"):
        settings_in_source("made_up", "Other")


def test_a_settings_class_is_read_through_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder's other modules are read, too, and nothing of it is imported."""
    folder = tmp_path / "made_up_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("import nowhere\nfrom made_up_package.settings import Settings\n")
    (folder / "kinds.py").write_text("import nowhere\nKINDS = ['a', 'b']\nLOST = nowhere.KINDS\n")
    (folder / "settings.py").write_text(
        "from dataclasses import dataclass, field\nimport nowhere\nfrom made_up_package.kinds import KINDS, LOST\n\n"
        "@dataclass\nclass Settings:\n    kind: str = field(default='a', metadata={'help': ', '.join(KINDS)})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert flags_of(settings_in_source("made_up_package", "Settings")) == [Flag("kind", "str", "a", "a, b")]
    assert "made_up_package" not in sys.modules
