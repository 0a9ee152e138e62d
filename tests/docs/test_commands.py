"""The code in README, CONTRIBUTING and docs/: what each block is held to.

- ``rrhf …``: read by the command's real parser; a configuration with its overrides by the run's own check.
- ``make …``, ``python …``, ``pip install 'rrhf[…]'``, other packages' commands: the target, script, extra or command is
  there, no more.
- Python: run on tiny stand-ins. JSON and YAML: read.
- The commands of the README's walk and of CONTRIBUTING: run, in ``test_walks.py``.

Whatever else stands in a shell's or a Python block has its reason in front of it: ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest
import yaml

from rrhf.cli.main import COMMANDS
from rrhf.cli.parser import PlainParser
from rrhf.common.errors import UserError
from rrhf.common.flags import Flags
from rrhf.recipes.config import override, parse_config, read_config, shipped
from support import tiny
from support.markdown import ROOT, SHELL, Block, blocks, pages

BLOCKS = [block for page in pages() for block in blocks(page)]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


class Parsed(BaseException):
    """The arguments were read: the command goes no further. Not an Exception, so that no command catches it."""


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """Commands read their arguments and end there."""

    def reads(kind: type, name: str) -> Any:
        plain = getattr(kind, name)

        def read(self: Any, *arguments: Any) -> NoReturn:
            raise Parsed(plain(self, *arguments))

        return mock.patch.object(kind, name, read)

    with reads(Flags, "parse"), reads(PlainParser, "parse_args"), reads(PlainParser, "parse_intermixed_args"):
        yield


def check(words: list[str], folder: Path) -> None:
    """Hold one command of a shell's block to what is there.

    Raises:
        UserError: of ``rrhf``: what its parser says.
        ValueError: another command, or its target, script or extra is not there.
    """
    program, *arguments = words
    if program == "rrhf" or program.endswith("/rrhf"):
        check_rrhf(arguments, folder)
    elif "rrhf.cli" in words:  # behind a launcher
        check_rrhf(words[words.index("rrhf.cli") + 1 :], folder)
    elif program == "make":
        missing = {word for word in arguments if "=" not in word} - TARGETS
        if missing:
            raise ValueError(f"make has no target {', '.join(missing)}")
    elif program == "python" and arguments[0] == "-m":
        if importlib.util.find_spec(arguments[1]) is None:
            raise ValueError(f"no module {arguments[1]}")
    elif program == "python" and not arguments[0].startswith("-"):
        if not (ROOT / arguments[0]).exists():
            raise ValueError(f"no script {arguments[0]}")
    elif words[:2] == ["pip", "install"]:
        extras = [extra for group in re.findall(r"^rrhf\[(.*)\]$", arguments[-1]) for extra in group.split(",")]
        if not extras or not set(extras) <= set(EXTRAS):
            raise ValueError(f"{arguments[-1]} is no extra of rrhf")
    elif program != "export" and program not in entry_points(group="console_scripts").names:
        raise ValueError(f"{program}: nothing here checks it: say why before the block, <!-- not run: reason -->")


def check_rrhf(arguments: list[str], folder: Path) -> None:
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(f"rrhf has no command {name}")
    try:
        with parsing():
            importlib.import_module(f"rrhf.cli.{name.replace('-', '_')}").main(rest)
    except Parsed as parsed:
        read = parsed
    except UserError as error:
        if "…" in rest and "required" in str(error):  # the reader is to fill in the rest
            return
        raise
    else:
        raise ValueError(f"rrhf {name} read nothing")
    if name in ("run", "demo"):
        (options,) = read.args
        base = getattr(options, "config", "demo")
        known = base.split("+")[0] in shipped()  # others are the reader's own files
        parse_config(override(read_config(base if known else "demo"), options.overrides), folder)


def shell_blocks() -> list[Block]:
    return [block for block in BLOCKS if block.language in SHELL]


@pytest.fixture()
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Puts the modules that a page shows into the current folder, and forgets them afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)

    def put(page: Path) -> None:
        for block in blocks(page):
            if block.language == "python" and block.file:
                (tmp_path / block.file).write_text(block.text, encoding="utf-8")

    yield put
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("block", shell_blocks(), ids=lambda block: block.place)
def test_commands_are_read_by_the_real_parsers(block: Block, tmp_path: Path, beside: Callable[[Path], None]) -> None:
    beside(block.page)
    assert block.commands()
    for words in block.commands():
        if block.reason is None or words[0] == "rrhf" or "rrhf.cli" in words:  # a reason is never one for ours
            check(words, tmp_path)


def test_there_are_commands_of_every_kind() -> None:
    """That the blocks are found at all."""
    commands = {words[1] for block in shell_blocks() for words in block.commands() if words[0] == "rrhf"}
    assert {"convert", "sample", "score", "train", "run", "evaluate", "baseline", "judge", "reward-model"} <= commands
    assert len([block for block in BLOCKS if block.language == "python" and block.reason is None]) > 6


WRONG = {
    "rrhf sampel --data x": "no command sampel",
    "rrhf sample --data q --output r --polices top-p": "unknown flag --polices",
    "rrhf sample --data q --output r --policy top-q": "top-q",
    "rrhf score --data q": "required",
    "rrhf run hh-dp --output o train.learning_rates=1": "unknown key",
    "rrhf run hh-dp --output o train.max_steps=few": "max_steps",
    "torchrun -m rrhf.cli train --model m --data d --output o --rank_wieght 2": "rank_wieght",
    "make tset": "no target tset",
    "python benchmarks/none.py": "no script",
    "pip install 'rrhf[all]'": "no extra",
    "llama-cli -m x": "nothing here checks it",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_command_is_seen(text: str, tmp_path: Path) -> None:
    (words,) = Block(ROOT / "README.md", 1, "sh", text).commands()
    with pytest.raises((UserError, ValueError), match=WRONG[text]):
        check(words, tmp_path)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in ("json", "yaml")], ids=lambda block: block.place
)
def test_json_and_yaml_can_be_read(block: Block) -> None:
    if block.language == "yaml":
        assert isinstance(yaml.safe_load(block.text), dict)
        return
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())


@pytest.mark.parametrize(
    "page", sorted({block.page for block in BLOCKS if block.language == "python"}), ids=lambda page: page.name
)
def test_python_blocks_run(page: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks in turn, with what a reader has: a model, its tokenizer, records and files of them, a run."""
    from rrhf.models.load import ModelSettings, load_policy
    from rrhf.records.record import record_from_row

    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "model").symlink_to(model)
    policy, tokenizer = load_policy(ModelSettings(model=str(model), device="cpu", dtype="float32"))
    records = [record_from_row(row, "here") for row in tiny.rows(4)]
    for name in ("queries.jsonl", "held_out.jsonl", "scored.jsonl"):
        tiny.write_rows(tmp_path / name, tiny.rows(2))
    names: dict[str, Any] = {"model": policy, "tokenizer": tokenizer, "records": records, "MODEL": str(model)}
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
