"""What the code may never do, read from its syntax trees: unpickle, run what a file or a server says, ask a shell."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "rrhf"

# Where one of these stands all the same, and why.
ALLOWED = {
    ("common/flag_help.py", "exec"): "defaults of our own settings classes, from our own source, for --help",
    ("common/flag_help.py", "eval"): "the same",
    ("common/yaml_text.py", "yaml.load"): "with a SafeLoader that refuses more",
    ("rewards/reward_models/heads.py", "import pickle"): "for the name of the error that weights_only raises",
}
FORBIDDEN = {
    "eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "yaml.load_all", "pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load",
    "dill.load", "cloudpickle.load", "pandas.read_pickle", "tempfile.mktemp", "shutil.unpack_archive",
    "csv.writer", "csv.DictWriter",  # a text that begins with = would be a formula for whoever opens it
}  # fmt: skip
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NO_TRUST = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "use_safetensors": False, "verify": False}


def faults(text: str, file: str) -> Iterator[str]:
    """What is forbidden in a module: the line and what it does."""
    for node in ast.walk(ast.parse(text)):
        found = None
        if isinstance(node, ast.Call):
            found = _call(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [str(module)] if module else [alias.name for alias in node.names]
            found = next((f"import {name}" for name in names if name.partition(".")[0] in UNPICKLERS), None)
        if found and (file, found) not in ALLOWED:
            yield f"{file}:{node.lineno}: {found}"


def _call(node: ast.Call) -> str | None:
    name = ast.unparse(node.func)
    keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    if name in FORBIDDEN or name.endswith((".extractall", ".extract")):
        return name
    if name == "torch.load" and keywords.get("weights_only") is not True:
        return "torch.load without weights_only=True"
    for argument, value in NO_TRUST.items():
        if keywords.get(argument) is value:
            return f"{argument}={value}"
    return None


def test_nothing_forbidden_stands_in_the_code() -> None:
    found = [
        fault
        for path in sorted(SOURCE.rglob("*.py"))
        for fault in faults(path.read_text(encoding="utf-8"), str(path.relative_to(SOURCE)))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "eval(x)", "exec(x)", "os.system(x)", "subprocess.run(x, shell=True)", "torch.load(f)", "import pickle",
        "torch.load(f, weights_only=False)", "from dill import load", "yaml.load(x, L)",
        "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "tar.extractall(path)", "csv.writer(f)",
        "get(url, verify=False)",
    ],
)  # fmt: skip
def test_the_search_finds_it(line: str) -> None:
    assert list(faults(line, "some.py"))


def test_what_is_allowed_is_there() -> None:
    """An exception that nobody needs any more is none."""
    for file, what in ALLOWED:
        text = (SOURCE / file).read_text(encoding="utf-8")
        assert what.removeprefix("import ") in text, (file, what)


def test_every_dependency_has_its_reason() -> None:
    """docs/dependencies.md has each requirement of pyproject.toml with its kind and a reason, and nothing else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted: dict[str, set[str]] = {_name(line): {"core"} for line in project["dependencies"]}
    for extra, lines in project["optional-dependencies"].items():
        for line in lines:
            if not line.startswith("rrhf["):
                wanted.setdefault(_name(line), set()).add(extra)
    table = dict(_rows((ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")))
    lacking = {name: kinds for name, kinds in wanted.items() if name not in table}
    assert not lacking, f"docs/dependencies.md gives no reason for {lacking}"
    for name, kinds in wanted.items():
        kind, reason = table[name]
        named = {"core"} if kind == "core" else set(re.findall(r"`([\w-]+)`", kind))
        assert kinds <= named | {"dev"} or "core" in named, f"{name}: {kind} in docs/dependencies.md, {kinds} wanted"
        assert len(reason.split()) >= 1, name


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower()


def _rows(page: str) -> Iterator[tuple[str, tuple[str, str]]]:
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 4:
            for name in cells[0].split(", "):
                yield name.lower(), (cells[1], cells[3])
