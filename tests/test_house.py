"""The house stays as it was drawn (docs/architecture.md): which way imports run, and how large things get."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "rrhf"

# Each room imports only itself and rooms to its left; those on one floor do not import each other.
FLOORS = [
    ["common"], ["losses"], ["records"], ["models"], ["sampling"], ["rewards"], ["evaluation"], ["training"],
    ["report", "arena"], ["cluster"], ["recipes"], ["cli"],
]  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
TOP_ENTRIES, FUNCTION_LINES = 14, 60


def modules(package: Path) -> dict[str, ast.Module]:
    """Every module of a package by its dotted name; a package's ``__init__`` bears the package's."""
    named = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        named[name] = ast.parse(path.read_text(encoding="utf-8"))
    return named


def imports(package: Path) -> dict[str, set[str]]:
    """Module → modules of the package that it imports: at the top, inside functions and under TYPE_CHECKING alike."""
    trees = modules(package)
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        graph[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in trees}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}, line {node.lineno}: a relative import"
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {target for target in inside if target in trees} or {str(node.module)} & set(trees)
    return graph


def wrong_ways(package: Path) -> Iterator[str]:
    for name, targets in imports(package).items():
        room = name.split(".")[1] if "." in name else None
        if room is not None and room not in FLOOR:
            yield f"{name}: no floor is named for {room}"
        for target in sorted(targets):
            other = target.split(".")[1] if "." in target else None
            if room != other and room in FLOOR and other in FLOOR and FLOOR[other] >= FLOOR[room]:
                yield f"{name} imports {target}"


def circles(package: Path) -> Iterator[str]:
    graph, finished = imports(package), set()

    def visit(name: str, way: list[str]) -> Iterator[str]:
        if name in way:
            yield " → ".join([*way[way.index(name) :], name])
        elif name not in finished:
            for target in sorted(graph[name]):
                yield from visit(target, [*way, name])
            finished.add(name)

    for name in graph:
        yield from visit(name, [])


def too_many_entries(package: Path) -> Iterator[str]:
    entries = [path.name for path in package.iterdir() if path.name not in ("__init__.py", "py.typed", "__pycache__")]
    if len(entries) > TOP_ENTRIES:
        yield f"{len(entries)} entries: {', '.join(sorted(entries))}"


def long_functions(package: Path) -> Iterator[str]:
    for name, tree in modules(package).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = int(node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    yield f"{name}.{node.name} has {lines} lines"


def empty_folders(package: Path) -> Iterator[str]:
    """Folders with no file but an ``__init__.py`` of a docstring alone."""
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        if not any(path.name != "__init__.py" or len(ast.parse(path.read_text("utf-8")).body) > 1 for path in files):
            yield str(folder.relative_to(package.parent))


@pytest.mark.parametrize("check", [wrong_ways, circles, too_many_entries, long_functions, empty_folders])
def test_the_house_holds(check: Callable[[Path], Iterator[str]]) -> None:
    assert list(check(SOURCE)) == []


# --- the checks themselves, on small made-up packages ----------------------------------------------------------------

LONG = "def long():\n" + "    x = 1\n" * FUNCTION_LINES
SHORT = "class C:\n    async def short(self):\n" + "        x = 1\n" * (FUNCTION_LINES - 1)
BROKEN: dict[str, tuple[Callable[[Path], Iterator[str]], dict[str, str], list[str]]] = {
    "upwards": (
        wrong_ways,
        {"common/a.py": "from rrhf.models import b", "models/b.py": ""},
        ["rrhf.common.a imports rrhf.models.b"],
    ),
    "upwards, lazily": (
        wrong_ways,
        {"losses.py": "def f():\n    import rrhf.cli.main", "cli/main.py": ""},
        ["rrhf.losses imports rrhf.cli.main"],
    ),
    "upwards, for types": (
        wrong_ways,
        {"records/a.py": "if TYPE_CHECKING:\n    from rrhf.models.b import B", "models/b.py": "class B: ..."},
        ["rrhf.records.a imports rrhf.models.b"],
    ),
    "across a floor": (
        wrong_ways,
        {"arena/a.py": "from rrhf.report.b import B", "report/b.py": "class B: ..."},
        ["rrhf.arena.a imports rrhf.report.b"],
    ),
    "a room without a floor": (wrong_ways, {"attic/a.py": ""}, ["rrhf.attic.a: no floor is named for attic"]),
    "downwards": (wrong_ways, {"cli/a.py": "from rrhf.common import b", "common/b.py": ""}, []),
    "a circle": (
        circles,
        {
            "models/a.py": "from rrhf.models.b import B",
            "models/b.py": "def f():\n    from rrhf.models import c",
            "models/c.py": "if TYPE_CHECKING:\n    import rrhf.models.a",
        },
        ["rrhf.models.a → rrhf.models.b → rrhf.models.c → rrhf.models.a"],
    ),
    "two ways to one place": (
        circles,
        {
            "models/a.py": "from rrhf.models import b, c",
            "models/b.py": "import rrhf.models.c",
            "models/c.py": "",
        },
        [],
    ),
    "15 entries": (
        too_many_entries,
        {"py.typed": "", **{f"m{i:02d}.py": "" for i in range(15)}},
        ["15 entries: " + ", ".join(f"m{i:02d}.py" for i in range(15))],
    ),
    "14 entries": (too_many_entries, {"py.typed": "", **{f"m{i:02d}.py": "" for i in range(14)}}, []),
    "61 lines": (long_functions, {"common/a.py": LONG}, ["rrhf.common.a.long has 61 lines"]),
    "60 lines": (long_functions, {"common/a.py": SHORT}, []),
    "a stub": (empty_folders, {"a.py": "", "arena/__init__.py": '"""Later."""'}, ["rrhf/arena"]),
    "a folder of data": (empty_folders, {"recipes/__init__.py": "", "recipes/configs/a.yaml": ""}, []),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_checks_see_what_is_wrong(case: str, tmp_path: Path) -> None:
    check, files, faults = BROKEN[case]
    for name, text in {"__init__.py": "", **files}.items():
        path = tmp_path / "rrhf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert list(check(tmp_path / "rrhf")) == faults


# --- the lock --------------------------------------------------------------------------------------------------------


ENGINES = ("openvino", "vllm")  # extras with environments of their own


def lock_faults(project: dict[str, object], lock: str, others: list[str]) -> Iterator[str]:
    """What ``make setup`` installs of ``project`` and ``lock`` lacks, or holds twice or in a version not allowed."""
    locked: dict[str, str] = {}
    for line in lock.splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name in locked:
                yield f"{name} stands there twice"
            locked[name] = str(requirement.specifier).removeprefix("==")
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict) and isinstance(project["dependencies"], list)
    installed = [line for extra, lines in extras.items() if extra not in ENGINES for line in lines]
    for line in [*project["dependencies"], *installed, *others]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == project["name"]:
            continue
        if name not in locked:
            yield f"{name} is missing: run `make lock`"
        elif locked[name] not in requirement.specifier:
            yield f"{name} {locked[name]} is not {requirement.specifier}: run `make lock`"


def test_the_lock_has_every_package_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    others = [
        line for name in ("TORCH", "CARRIED") for line in re.findall(rf"^{name} := (.*)", makefile, re.M)[0].split()
    ]
    assert len(others) == 4
    lock = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert list(lock_faults(project, lock, [*others, "setuptools"])) == []
    assert not re.search("^(nvidia|cuda|triton)", lock, re.M)  # they come with the builds of torch that need them


def test_a_lock_with_faults_is_seen() -> None:
    project = {
        "name": "rrhf",
        "dependencies": ["a>=1.5", "B_c[extra]>=1", "d"],
        "optional-dependencies": {"vllm": ["vllm"], "dev": ["rrhf[demo]", "e>=2"]},
    }
    lock = "# words\na==1.4\nb-c==2.0 ; python_version < '4'\nb-c==3.0\ne==2.1\n"
    assert list(lock_faults(project, lock, ["f"])) == [
        "b-c stands there twice",
        "a 1.4 is not >=1.5: run `make lock`",
        "d is missing: run `make lock`",
        "f is missing: run `make lock`",
    ]


# --- the lower bounds ------------------------------------------------------------------------------------------------


def bound_faults(project: dict[str, object], page: str) -> Iterator[str]:
    """Requirements of ``project`` without a lower bound, or with another one than ``page`` has in its table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    column = rows[0].index("lowest version tested")
    tested = {canonicalize_name(name): row[column].split()[0] for row in rows[2:] for name in row[0].split(", ")}
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict) and isinstance(project["dependencies"], list)
    bounds: dict[str, set[str]] = {}
    for line in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
        requirement = Requirement(line)
        lowest = {part.version for part in requirement.specifier if part.operator in (">=", "==")}
        bounds.setdefault(canonicalize_name(requirement.name), set()).update(lowest)
    bounds.pop(canonicalize_name(str(project["name"])), None)
    for name, versions in bounds.items():
        if len(versions) != 1:
            yield f"{name} has {len(versions)} lower bounds in pyproject.toml"
        elif name not in tested:
            yield f"{name} is not in the table of docs/dependencies.md"
        elif {tested[name]} != versions:
            yield f"{name}: {tested[name]} was tested, {versions.pop()} is allowed"


def test_every_requirement_has_a_lower_bound_that_was_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert list(bound_faults(project, (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8"))) == []


def test_a_bound_with_faults_is_seen() -> None:
    project = {
        "name": "rrhf",
        "dependencies": ["a>=1.5", "B_c>=1,<2", "d", "e<3", "f>=1"],
        "optional-dependencies": {"dev": ["rrhf[demo]", "a[extra]", "g>=2", "f>=2", "h>=6.0"]},
    }
    page = (
        "words\n\n| package | lowest version tested | why |\n| --- | --- | --- |\n| a | 1.5 | x |\n"
        "| b-c | 1 (no GPU) | |\n| d, e, f | 1 | |\n| h | 5.4 | |\n"
    )
    assert list(bound_faults(project, page)) == [
        "d has 0 lower bounds in pyproject.toml",
        "e has 0 lower bounds in pyproject.toml",
        "f has 2 lower bounds in pyproject.toml",
        "g is not in the table of docs/dependencies.md",
        "h: 5.4 was tested, 6.0 is allowed",
    ]
