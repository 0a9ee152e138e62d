"""The command ``rrhf``: finds the command's module and imports nothing else."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from typing import Any

from rrhf import __version__
from rrhf.common.errors import UserError, nearest
from rrhf.common.launch import end_process_group
from rrhf.models.devices import set_up_memory

# What a wrong file's or folder's name leads to, where no command has looked before.
MISNAMED = (IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError)

# name → what the overview says of it; each is a module of rrhf.cli, with _ for -
COMMANDS = {
    "demo": "the whole job on what installed packages carry",
    "run": "sample → score → train → evaluate → report, from one configuration; run again to resume",
    "sample": "draw responses to queries",
    "score": "score responses",
    "train": "train a policy on scored responses",
    "evaluate": "measure a model, or two on the same prompts",
    "baseline": "RRHF's rivals, fairly: sft, best-of-n, …",
    "arena": "compare systems by people, blind, on a page in their browser",
    "judge": "compare two systems' answers by judges, with what the judges are worth",
    "reproduce": "the paper's systems and their rivals as one table: arms × seeds",
    "inspect": "look into a file of records",
    "convert": "turn other data sets into records",
    "report": "one HTML page of one run or several",
    "reward-model": "train a reward model on pairs or ranked lists",
    "publish": "a model card, an upload to the hub, or a GGUF file for llama.cpp",
}


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  rrhf {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"rrhf {__version__}: align language models by ranking responses",
            "",
            *lines,
            "",
            "rrhf COMMAND --help says more.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 2 the user can mend it, 130 / 143 stopped by a signal, 1 a fault of ours."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"rrhf: unknown command {name!r}: {nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    set_up_memory(rest)
    try:
        code = _carry_out(name, rest)
        end_process_group()
        return code
    except UserError as error:
        print(f"rrhf {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"rrhf {name}: stopped; what is finished is kept, and the same command goes on from there", file=sys.stderr
        )
        return 130
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"rrhf {name}: {error}: free some space; what is finished is kept", file=sys.stderr)
            return 2
        if (isinstance(error, MISNAMED) or error.errno == errno.EROFS) and error.filename:
            print(f"rrhf {name}: {error.filename}: {error.strerror}: name another, or mend it", file=sys.stderr)
            return 2
        if isinstance(error, FileNotFoundError):
            print(
                f"rrhf {name}: {error.filename} is gone: it, or its folder, was removed while the command ran. The "
                "same command makes what is missing again",
                file=sys.stderr,
            )
            return 2
        raise


def _carry_out(name: str, arguments: list[str]) -> int:
    def work(given: list[str]) -> int:
        return int(importlib.import_module(f"rrhf.cli.{name.replace('-', '_')}").main(given) or 0)

    if not any("://" in argument for argument in arguments):
        return work(arguments)
    from rrhf.cli.urls import with_urls

    return with_urls(name, arguments, work)


def _terminate(number: int, frame: Any) -> None:
    print("rrhf: terminated; what is finished is kept, and the same command goes on from there", file=sys.stderr)
    raise SystemExit(128 + number)
