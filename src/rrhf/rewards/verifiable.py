"""Answers that can be checked: ``--reward rrhf.rewards.verifiable:math_verify``, by the library math-verify.

The library's own time limits are alarms, which work in a main thread alone and wait for a running product of Python's
to end. So answers are checked in a process of its own: the kernel ends it where a check takes more than ``SECONDS`` of
processor time, wherever it is, and another one goes on. It may take ``MEMORY`` bytes.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rrhf.common.errors import UserError

SECONDS = 5.0  # of processor time, for one answer
MEMORY = 4 << 30
MATHEMATICS = re.compile(r"[\\^_{}()\[\]+*/=<>-]")


def math_verify(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 where a completion's answer equals the record's, as numbers, expressions or sets; else 0.

    A reward function with TRL's signature. None where the record's own answer cannot be parsed; 0 also where a
    completion has no answer, or one that takes longer than ``SECONDS`` to check.

    Args:
        prompts, completions: as text or messages, one a response.
        answer, solution: the column with the right answer, plain or in LaTeX; text around it does no harm, and of
            GSM8K's solutions what stands behind ``####`` counts. A record without ``answer`` is held to its solution.

    Raises:
        UserError: math-verify is not installed, or the records have neither column.
    """
    if answer is None and solution is None:
        raise UserError("math_verify asks for the column 'answer' (or 'solution'), which the records lack: add it")
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("math_verify needs the library of that name: pip install 'rrhf[math]'")
    answers, solutions = ([None] * len(completions) if given is None else given for given in (answer, solution))
    right = [second if first is None else first for first, second in zip(answers, solutions, strict=True)]
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [
        None if gold is None else CHECKER.check(str(gold).rpartition("####")[2].strip(), text)
        for gold, text in zip(right, texts, strict=True)
    ]


class Checker:
    """A process that checks one answer after another; started when first asked, and again where it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def check(self, gold: str, text: str) -> float | None:
        """1 where ``text`` has the answer ``gold``, 0 where not, None where ``gold`` cannot be parsed."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([gold, text, SECONDS]) + "\n")
            process.stdin.flush()
            parsed = process.stdout.readline()
            right = process.stdout.readline() if parsed.strip() == "true" else "-"
            if not parsed or not right:  # it is gone
                self.close()
            return float(right.strip() == "true") if parsed.strip() == "true" else None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._owner == os.getpid():  # a fork must not talk into its parent's pipe
            if self._process.poll() is None:
                return self._process
            self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from rrhf.rewards.verifiable import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        )  # fmt: skip
        self._owner = os.getpid()
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "true":
            self.close()
            raise UserError(
                "math_verify: the process that checks answers does not start (it needs Linux or macOS): "
                "python -c 'from rrhf.rewards.verifiable import serve; serve()' says why"
            )
        return self._process

    def close(self) -> None:
        """End the process, if it runs."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


CHECKER = Checker()
atexit.register(CHECKER.close)


# --- in the process ----------------------------------------------------------------------------------------------


def serve() -> None:
    """Say true when ready; then of each line ``[gold, text, seconds]`` whether gold can be parsed and text is right."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    import math_verify as library

    _say(True)
    for line in sys.stdin:
        gold, text, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        known = _gold(gold)
        _say(bool(known))
        if known:
            try:
                right = library.verify(known, library.parse(text, parsing_timeout=None), timeout_seconds=None)
            except Exception:  # sympy fails in many ways on what models write
                right = False
            _say(bool(right))
        signal.setitimer(signal.ITIMER_PROF, 0)


@lru_cache(maxsize=1024)
def _gold(text: str) -> list[Any]:
    """The right answer; plain mathematics such as x^2+1 or {1, 2} is read as LaTeX."""
    import math_verify as library

    try:
        found: list[Any] = library.parse(text, parsing_timeout=None)
        if not found and MATHEMATICS.search(text):
            found = library.parse(f"${text}$", parsing_timeout=None)
    except Exception:
        return []
    return found


def _say(value: bool) -> None:
    print(json.dumps(value), flush=True)
