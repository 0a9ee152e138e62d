"""Studies for tests: systems' files, a study made by the command, and the command that serves it, as a process."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rrhf.cli.main import main


def write_system(path: Path, answers: Mapping[str, str], queries: Mapping[str, object] | None = None) -> Path:
    """A file of records: id → its one response; the query is the id's, or one that names it."""
    lines = [
        json.dumps({"id": name, "query": (queries or {}).get(name, f"Query {name}?"), "responses": [text]})
        for name, text in answers.items()
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def plain_systems(folder: Path, names: Sequence[str], count: int) -> list[str]:
    """The ``--data`` flags of systems whose every response names its system, for tests to know it by."""
    flags = []
    for name in names:
        answers = {f"q{i}": f"Response of {name} to q{i}: " + "one two three four " * 3 for i in range(count)}
        flags += ["--data", str(write_system(folder / f"{name}.jsonl", answers))]
    return flags


def create(arguments: Sequence[str], capsys: object) -> dict[str, str]:
    """Run ``rrhf arena create``; return the personal paths (``/r/…``) by name."""
    assert main(["arena", "create", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()  # type: ignore[attr-defined]
    rows = [line.split("\t") for line in lines if "\thttp" in line]
    return {name: "/" + url.split("/", 3)[3] for name, url in rows}


@dataclass
class Server:
    """``rrhf arena serve`` as a process of its own; ``url`` is where it listens."""

    study: str
    flags: Sequence[str] = ()
    url: str = ""
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def start(self, port: int = 0) -> None:
        command = [sys.executable, "-m", "rrhf.cli", "arena", "serve", self.study, "--port", str(port), *self.flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # written once connections are taken
        assert line.startswith("http"), line
        self.url = line.split(": serving")[0]

    def kill(self) -> None:
        """End it as a power cut would, as far as the process goes."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def start_again(self) -> None:
        self.start(int(self.url.rpartition(":")[2]))


@contextlib.contextmanager
def serving(study: str, *flags: str) -> Iterator[Server]:
    server = Server(study, flags)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.process.terminate()
            server.process.wait(30)
