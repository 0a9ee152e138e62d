"""URLs among a command's arguments: what it reads is brought here before it begins, what it writes goes up at its end.

The command itself sees local paths alone. What a flag's value is stands in ``KINDS``; a flag that is not there takes no
URL. Names of models, sources and rewards stay as they are: they stand in records and configurations, and are looked up
where they are used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rrhf.common.errors import UserError
from rrhf.common.files import cache_folder, write_text
from rrhf.common.launch import rank_and_world
from rrhf.common.remote import SUMS, Mirror, Store, fetched, is_url, mirror, shown, stands_for
from rrhf.training.folder import SETTINGS, is_trained

READ = "a file or folder that is read"
WRITTEN = "a file or folder that is written"
GROWN = "a file that is added to"
CARDED = "a model's folder that is read, and gets its card"
AS_IS = "a name that is looked up where it is used, an address or a text"
STUDY = "a study's file or server"

# flag, without its hyphens → what its values are; "COMMAND FLAG" where a command has another use for it
KINDS = {
    **dict.fromkeys(("data", "eval_data", "pairs", "questions", "a", "b", "judge", "watch_data"), READ),
    **dict.fromkeys(("results", "scores", "scale", "take", "check"), READ),
    **dict.fromkeys(("output", "html", "markdown", "votes", "export"), WRITTEN),
    **dict.fromkeys(("model", "reference_model", "value_model", "perplexity_model", "watch_perplexity_model"), AS_IS),
    **dict.fromkeys(("source", "reward", "gold_reward", "watch_reward", "url", "host", "cluster"), AS_IS),
    **dict.fromkeys(("system_prompt", "stop", "cut_markers", "message", "title", "question", "instructions"), AS_IS),
    "reproduce data": AS_IS,  # the run's data.source
    "reproduce export": GROWN,
}
# command → what stands there without a flag
BARE = {
    **dict.fromkeys(("run", "inspect", "convert", "report"), READ),
    "publish": CARDED,
    **dict.fromkeys(("demo", "reproduce"), AS_IS),  # their overrides
    **dict.fromkeys(("arena create", "arena serve", "arena results", "arena links"), STUDY),
}
FAMILIES = {"baseline", "arena"}  # commands of which the next word is the command
# flags without a value, where something stands bare
SWITCHES = {"overwrite", "dry_run", "every_rate", "page", "private", "queries_only", "quick", "small", "full", "help"}
SEVERAL = {"results", "scores", "weights", "without", "raters", "add"}  # flags of several values there
GONE_ON_WITH = {"run", "demo", "reproduce", "baseline best-of-n"}  # folders that a second command goes on in
FINISHED = "finished.json"  # in a staging folder: which command's result lies there and may not be up yet
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
CARD = "card"  # of `rrhf publish --to`
HELP = {"-h", "--help", "--help-all"}


class _Value(NamedTuple):
    """A value among the arguments, what it is, and where: its flag ("" where it stands bare), its place, what precedes
    it there."""

    text: str
    kind: str | None  # of KINDS or BARE; None: no place for a URL
    flag: str
    place: int
    before: str


def with_urls(command: str, arguments: list[str], work: Callable[[list[str]], int]) -> int:
    """Run ``work`` on the arguments with local paths in place of URLs, and send up what it wrote; its exit code.

    Raises:
        UserError: a URL cannot be read or written, stands where none can, or something stands there already.
    """
    if command in FAMILIES and arguments:
        command = f"{command} {arguments[0]}"
    urls = [value for value in _values(command, arguments) if is_url(value.text) and value.kind is not AS_IS]
    if not urls or HELP & set(arguments):
        return work(arguments)
    _refuse(command, urls)
    local, outputs = list(arguments), []
    stood_for: dict[str, str] = {}
    for value in urls:
        if value.kind in (WRITTEN, GROWN):
            outputs.append(_Output(command, value, arguments))
            place = str(outputs[-1].place)
            stood_for[place] = shown(value.text)
        else:
            place = _brought(command, value, stood_for)
        local[value.place] = value.before + place
    if _given("dry_run", arguments):
        return work(local)  # nothing is written
    if [output for output in outputs if output.waits()]:
        for output in outputs:
            output.send()
        return 0
    for output in outputs:
        output.begin()
    code = _work(work, local, stood_for)
    if code == 0:
        for output in outputs:
            output.finish()  # all, before one is sent: the same command sends what is left
        for output in outputs:
            output.send()
        if _given("to", arguments) == CARD:
            _send_cards(urls)
    return code


def _values(command: str, arguments: Sequence[str]) -> Iterator[_Value]:
    """Each value among the arguments of a command, such as ``score`` or ``arena create``."""
    flag, bare = "", BARE.get(command)
    for index, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            flag = name.replace("-", "_")
            if equals:
                yield _value(command, flag, value, index, f"--{name}=")
            if bare is not None and (equals or flag in SWITCHES):
                flag = ""
        else:
            yield _value(command, flag, argument, index, "")
            if bare is not None and flag not in SEVERAL:
                flag = ""


def _value(command: str, flag: str, text: str, index: int, before: str) -> _Value:
    kind = KINDS.get(f"{command} {flag}", KINDS.get(flag)) if flag else BARE.get(command)
    if command == "arena create" and flag == "data" and (named := re.fullmatch("([^=:/]+=)(.*)", text)):
        before, text = before + named[1], named[2]  # NAME=FILE
    return _Value(text, kind, flag, index, before)


def _given(flag: str, arguments: Sequence[str]) -> str:
    """The value of a flag, "true" where it has none, "" where it is not given."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("-", "_") == f"__{flag}":
            after = arguments[index + 1] if index + 1 < len(arguments) else "--"
            value = value if equals else "true" if after.startswith("--") or flag in SWITCHES else after
            return "" if value.lower() in ("false", "f", "no", "n", "0") else value
    return ""


def _refuse(command: str, urls: Sequence[_Value]) -> None:
    faults = []
    for value in urls:
        name = f"--{value.flag} {shown(value.text)}" if value.flag else shown(value.text)
        if value.kind is None:
            faults.append(f"{name}: no URL can stand there: give what lies on this machine")
        elif value.kind is STUDY and not value.text.startswith("postgresql"):
            faults.append(
                f"{name}: a study is a data base that is written while raters answer, which no URL of files can hold: "
                "give a file on this machine, or postgresql://USER@HOST/DATABASE"
            )
    if faults:
        raise UserError("\n".join(faults))


def _brought(command: str, value: _Value, stood_for: dict[str, str]) -> str:
    """The local copy of what is read; ``stood_for`` takes down what it is a copy of."""
    if value.kind is STUDY:
        return value.text
    line = re.search(r"(?<=\.jsonl):\d+$", value.text) if value.flag == "check" else None  # FILE.jsonl:LINE
    url = value.text[: line.start()] if line else value.text
    place = str(fetched(url, skip=WEIGHTS if command == "report" else ()))
    stood_for[place] = shown(url)
    return place + (line[0] if line else "")


def _work(work: Callable[[list[str]], int], arguments: list[str], stood_for: Mapping[str, str]) -> int:
    """Run ``work``; its errors name files as they were given."""
    try:
        return work(arguments)
    except UserError as error:
        message = str(error)
        for place, url in stood_for.items():
            message = message.replace(place, url)
        raise UserError(message) from error


def _send_cards(urls: Sequence[_Value]) -> None:
    """Send the model card that was written into the local copy of a model's folder."""
    from rrhf.report.card import CARD as NAME

    for value in urls:
        if value.kind is CARDED:
            Mirror(value.text, fetched(value.text), lambda path: path.is_file() and path.name != NAME).push()
            print(f"rrhf publish: {NAME} in {shown(value.text)}", file=sys.stderr)


class _Output:
    """Where a command writes what is to go to a URL: a folder in the cache, one for each URL."""

    def __init__(self, command: str, value: _Value, arguments: list[str]) -> None:
        self.command, self.kind, self.store = command, value.kind, Store(value.text)
        self.overwrite = bool(_given("overwrite", arguments))
        self.root = cache_folder() / "remote" / "outputs" / self.store.digest
        self.staging = self.root / "work"
        self.place = Path(self.store.path) if self.store.protocol == "file" else self.staging / self.store.name
        self.asked = hashlib.sha256(json.dumps([command, *arguments]).encode()).hexdigest()
        self.main = rank_and_world()[0] == 0
        self.remote = self.store.protocol != "file"
        self.folder = command in GONE_ON_WITH and self.kind is WRITTEN  # a second command goes on in it
        self.marker = self.staging / FINISHED
        self.above = self.store.url.partition("?")[0].rpartition("/")[0]
        if self.remote:
            stands_for(self.staging, self.above)

    def waits(self) -> bool:
        """Whether this very command had finished before, and only the sending is left.

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
        return True

    def begin(self) -> None:
        """Refuse what cannot be written; bring what is finished already of a folder that is gone on with."""
        if not self.remote or not self.main:
            return
        listed = self.store.inside(SUMS) if self.folder else self.store.beside(f"{self.store.name}.sha256")
        may = self.folder or self.overwrite or self.kind is GROWN
        if not may and (self.store.exists() or listed.exists()):
            raise UserError(f"{self.store} exists already: give --overwrite to replace it, or another place")
        if not self.folder and self.place.is_file() and not self.marker.exists():
            self.place.unlink()  # of a command that failed behind it; what it goes on by are parts and journals
        self.store.check_writable(self.staging)
        print(
            f"rrhf {self.command}: works in {self.place}; what is finished goes to {self.store}",
            file=sys.stderr,
            flush=True,
        )
        if self.kind is GROWN and self.store.exists():
            self.store.download(self.place, None)
        if self.folder:
            self.place.mkdir(parents=True, exist_ok=True)
            made = Mirror(self.store.url, self.place, unfinished)
            if brought := made.pull():
                print(f"rrhf {self.command}: {brought} finished files were there already", file=sys.stderr, flush=True)
            mirror(made)

    def finish(self) -> None:
        """Note that the result is whole, and whose it is."""
        if self.remote and self.main and self.place.exists() and not self.folder:
            write_text(self.marker, json.dumps({"command": self.asked}))

    def send(self) -> None:
        """Send what is finished, each file checked; a result that is no folder to go on in is kept there alone."""
        if not self.remote or not self.main or not self.place.exists():
            return
        sums = f"{self.store.name}.sha256"
        if self.folder:
            Mirror(self.store.url, self.place, unfinished).push()
            return
        if self.place.is_dir():
            Mirror(self.store.url, self.place, unfinished).push(exact=True)
            beside = Mirror(self.above, self.staging, lambda path: path == self.place or unfinished(path), sums)
            if any(beside.files()):
                beside.push(exact=True)
        else:
            Mirror(self.above, self.staging, unfinished, sums, last=self.store.name).push(exact=True)
        if rank_and_world()[1] == 1:  # else others may still look for it
            shutil.rmtree(self.root)
        print(f"rrhf {self.command}: {self.store}", file=sys.stderr)


def unfinished(path: Path) -> bool:
    """Whether a file or folder of an output is work on the way: parts, journals, checkpoints, models in training."""
    name = path.name
    working = name.endswith((".parts", ".parts.removed", ".journals", ".tmp", ".sent.json")) or name == FINISHED
    training = (path / SETTINGS).exists() and not is_trained(path)
    return working or name.startswith(("checkpoint-", "journal-")) or training
