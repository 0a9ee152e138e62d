"""URLs among a command's arguments: what it reads is brought here before it begins, what it writes goes up at its end.

The command itself sees local paths alone. Names of models, sources and rewards stay as they are: they stand in records
and configurations, and are looked up where they are used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rrhf.common.errors import UserError
from rrhf.common.files import cache_folder, write_text
from rrhf.common.launch import rank_and_world
from rrhf.common.remote import SUMS, Mirror, Store, fetched, is_url, mirror
from rrhf.training.folder import SETTINGS, is_trained

INPUTS = {"data", "eval_data", "pairs", "questions", "a", "b", "judge", "check", "held_out"}  # flags of what is read
OUTPUTS = {"output", "html"}
BARE = {"run", "inspect", "convert", "report", "publish"}  # commands that read what stands without a flag
SWITCHES = {"overwrite", "dry_run", "page", "private"}  # flags without a value
GONE_ON_WITH = {"run", "demo", "reproduce", "baseline"}  # folders that a second command goes on in
FINISHED = "finished.json"  # in a staging folder: which command's result lies there and may not be up yet
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def with_urls(command: str, arguments: list[str], work: Callable[[list[str]], int]) -> int:
    """Run ``work`` on the arguments with local paths in place of URLs, and send up what it wrote; its exit code.

    Raises:
        UserError: a URL cannot be read or written, or something stands there already.
    """
    if not any(is_url(value) for value, _ in _values(command, arguments)):
        return work(arguments)
    outputs: list[_Output] = []
    local = list(arguments)
    for value, place in _values(command, arguments):
        if not is_url(value):
            continue
        flag, index, prefix = place
        if flag in OUTPUTS:
            outputs.append(_Output(command, value, arguments))
            local[index] = prefix + str(outputs[-1].place)
        else:
            local[index] = prefix + str(fetched(value, skip=WEIGHTS if command == "report" else ()))
    if {"--dry_run", "--dry-run"} & set(arguments):
        return work(local)  # nothing is written
    for output in outputs:
        if output.sent_what_was_left():
            return 0
    for output in outputs:
        output.begin()
    code = work(local)
    if code == 0:
        for output in outputs:
            output.send()
    return code


def _values(command: str, arguments: list[str]) -> Iterator[tuple[str, tuple[str, int, str]]]:
    """Each argument that names what is read or written: itself, and its flag, index and what stands before it there."""
    flag = ""
    for index, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            flag = name.replace("-", "_")
            if equals and flag in INPUTS | OUTPUTS:
                yield value, (flag, index, f"--{name}=")
            if equals or flag in SWITCHES:
                flag = ""
        elif flag in INPUTS | OUTPUTS or (not flag and command in BARE):
            yield argument, (flag, index, "")
            flag = flag if flag in INPUTS else ""  # a flag of what is read may have several values
        else:
            flag = ""


class _Output:
    """Where a command writes what is to go to a URL: a folder in the cache, one for each URL."""

    def __init__(self, command: str, url: str, arguments: list[str]) -> None:
        self.command, self.overwrite, self.store = command, "--overwrite" in arguments, Store(url)
        self.root = cache_folder() / "remote" / "outputs" / self.store.digest
        self.staging = self.root / "work"
        self.place = Path(self.store.path) if self.store.protocol == "file" else self.staging / self.store.name
        self.asked = hashlib.sha256(json.dumps([command, *arguments]).encode()).hexdigest()
        self.main = rank_and_world()[0] == 0
        self.remote = self.store.protocol != "file"
        self.marker = self.staging / FINISHED

    def sent_what_was_left(self) -> bool:
        """Whether this very command had finished before, and only the sending was left; it is done now.

        Raises:
            UserError: the finished result of another command waits here to be sent.
        """
        if not self.remote or not self.main or not self.marker.exists():
            return False
        if json.loads(self.marker.read_text(encoding="utf-8"))["command"] != self.asked:
            if not self.overwrite:
                raise UserError(
                    f"{self.store}: an earlier command's result lies at {self.place} and was not sent: run that "
                    f"command again to send it, or give --overwrite to make it anew"
                )
            shutil.rmtree(self.root)
            return False
        print(f"rrhf {self.command}: {self.place} was finished before and is sent now", file=sys.stderr)
        self.send()
        return True

    def begin(self) -> None:
        """Refuse what cannot be written; bring what is finished already of a folder that is gone on with."""
        if not self.remote or not self.main:
            return
        folder = self.command in GONE_ON_WITH
        listed = self.store.inside(SUMS) if folder else self.store.beside(f"{self.store.name}.sha256")
        if not folder and not self.overwrite and (self.store.exists() or listed.exists()):
            raise UserError(f"{self.store} exists already: give --overwrite to replace it, or another --output")
        self.store.check_writable(self.staging)
        print(
            f"rrhf {self.command}: works in {self.place}; what is finished goes to {self.store}",
            file=sys.stderr,
            flush=True,
        )
        if folder:
            self.place.mkdir(parents=True, exist_ok=True)
            made = Mirror(self.store.url, self.place, unfinished)
            if brought := made.pull():
                print(f"rrhf {self.command}: {brought} finished files were there already", file=sys.stderr, flush=True)
            mirror(made)

    def send(self) -> None:
        """Send what was written, each file checked; a result that is no folder to go on in is kept there alone."""
        if not self.remote or not self.main or not self.place.exists():
            return
        if self.command in GONE_ON_WITH:
            Mirror(self.store.url, self.place, unfinished).push()
            return
        write_text(self.marker, json.dumps({"command": self.asked}))
        if self.place.is_dir():
            Mirror(self.store.url, self.place, unfinished).push(exact=True)
        else:
            above = self.store.url.partition("?")[0].rpartition("/")[0]
            Mirror(above, self.staging, unfinished, f"{self.store.name}.sha256", last=self.store.name).push(exact=True)
        if rank_and_world()[1] == 1:  # else others may still look for it
            shutil.rmtree(self.root)
        print(f"rrhf {self.command}: {self.store}", file=sys.stderr)


def unfinished(path: Path) -> bool:
    """Whether a file or folder of an output is work on the way: parts, journals, checkpoints, models in training."""
    name = path.name
    working = name.endswith((".parts", ".parts.removed", ".journals", ".tmp", ".sent.json")) or name == FINISHED
    training = (path / SETTINGS).exists() and not is_trained(path)
    return working or name.startswith(("checkpoint-", "journal-")) or training
