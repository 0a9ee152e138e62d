"""The package as it is published: the files of the wheel, and a run with it apart from this checkout (RRHF_LONG=1)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from support import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by ``python -m build``: a source distribution, and the wheel from that; of a copy, which it writes into."""
    tree = tmp_path_factory.mktemp("wheel") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    # No isolation: what builds it is in the lock, and no index is asked.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree.parent / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tree.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = (tree.parent / "dist").glob("*.whl")
    assert len(list((tree.parent / "dist").glob("*.tar.gz"))) == 1
    return found


def test_the_wheel_holds_the_files_of_the_package_and_no_others(wheel: Path) -> None:
    source = ROOT / "src" / "rrhf"
    ours = {
        f"rrhf/{path.relative_to(source).as_posix()}"
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        metadata = file.read(next(name for name in held if name.endswith("dist-info/METADATA"))).decode()
    assert {name for name in held if not name.startswith("rrhf-")} == ours
    assert {".yaml", ".j2", ".json", ".typed"} <= {Path(name).suffix for name in ours}
    assert "Name: rrhf" in metadata and "Provides-Extra: docs" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in held)


@pytest.mark.skipif(not tiny.LONG, reason="makes an environment and runs in it: make test-wheel")
def test_a_run_with_the_wheel_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has this one's packages, but not this checkout."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    clean = {name: value for name, value in tiny.environment().items() if not name.startswith("PYTHON")}

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd, env=clean)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A path in a .pth file: the .pth files that lie there, of an editable install for one, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index",
        "--ignore-installed", wheel)  # fmt: skip
    assert run(python, "-c", "import rrhf; print(rrhf.__file__)").startswith(str(packages))
    assert "rrhf run" in run(place / "bin" / "rrhf", "--help")
    model = tiny.write_model(tmp_path / "model")
    work = tiny.workplace(tmp_path / "work", tiny.config(model))
    run(place / "bin" / "rrhf", "run", "config.yaml", "--output", "run", "train.max_steps=2", cwd=work)
    assert json.loads((work / "run" / "evaluation.json").read_text(encoding="utf-8"))["pi"]["n"] == 9
    assert (work / "run" / "report.html").stat().st_size > 10_000
