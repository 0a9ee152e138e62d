"""Files at URLs (S3 and whatever else fsspec knows): brought here by checksum, and sent up whole by checksum.

Work is done on a local disk: what it reads is downloaded into the cache first, what it writes lies in a local folder
and goes up when it is finished. A list of checksums, in the form of ``sha256sum``, goes up last: a file that it does
not name is not finished. Nothing half-sent is ever seen under its name: an object store shows an object when all of it
is there, and other file systems get the file under another name first.

No message holds what a URL may carry of keys and passwords, nor those of the environment.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from rrhf.common.errors import UserError, nearest
from rrhf.common.files import cache_folder, checksum_of_file, read_object, replacing, write_text
from rrhf.common.locks import one_at_a_time

log = logging.getLogger("rrhf")

T = TypeVar("T")

SUMS = "SHA256SUMS"  # of a folder: a line a finished file
LINKS = "links.json"  # of a folder: name → what it points at, in the folder
PAUSES = (1.0, 4.0)  # seconds between two attempts
BLOCK = 1 << 22
COPIED = 1 << 26  # bytes; smaller files are copied before they are sent
WHOLE_PUTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}  # seen when they are whole
CREDENTIALS = "Credential|NoAuth|Unauthorized|InvalidAccessKey|SignatureDoesNotMatch|ProfileNotFound|Authentication"
FORBIDDEN = (401, 403)  # what many a server answers of a file that is not there
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
OURS = (TypeError, AttributeError, NameError, AssertionError, IndexError, MemoryError)


def is_url(name: str | Path) -> bool:
    """Whether a name is a URL: ``PROTOCOL://…``. A path never is."""
    return isinstance(name, str) and re.match(r"[a-z][a-z0-9+.-]*://.", name) is not None


def shown(url: str) -> str:
    """A URL for a message: without user, password and query, which may hold keys."""
    return re.sub(r"(//)[^/]*@|\?.*$", r"\1", url)


def refuse_keys(url: str) -> None:
    """Raise ``UserError`` for a URL that brings a password or a query where its name would be written down."""
    if is_url(url) and shown(url) != url:
        raise UserError(
            f"{shown(url)}: the URL carries a user, a password or a query, and would stand in configurations, records "
            "and cards: leave them out, and give them by the environment or fsspec's configuration file"
        )


# -- reading


def fetched(name: str | Path, skip: Collection[str] = ()) -> Path:
    """The local path of a file or folder: a path itself; a URL's content in the cache, downloaded where it changed.

    Args:
        name: a path or a URL.
        skip: patterns of files of a folder that are left where they are, such as ``*.safetensors``.

    Raises:
        UserError: it is not there or cannot be read, or does not fit its checksum.
    """
    if not is_url(name):
        return Path(name)
    store = Store(str(name))
    if store.protocol == "file":
        return Path(store.path)
    place = _cached(store)
    stands_for(place / store.name, store.url)
    with one_at_a_time(place):
        return _fetched(store, place, skip)


def _fetched(store: Store, place: Path, skip: Collection[str]) -> Path:
    info = store.info()
    if info["type"] != "directory":
        sums = _sums(store.beside(f"{store.name}.sha256"), needed=False)
        _bring({store.name: info}, sums, place, lambda _: store)
        return place / store.name
    found, there = place / store.name, store.files()
    files = {name: info for name, info in there.items() if not _skipped(name, skip)}
    if not files:
        raise UserError(f"{store}: no such file or folder, or an empty one: check the name")
    for here in list(found.rglob("*")):
        if here.is_file() and here.relative_to(found).as_posix() not in there:
            here.unlink()  # it is no more there
    _bring(files, _sums(store.inside(SUMS), needed=False), found, store.inside)
    _link(found)
    return found


_origins: dict[Path, str] = {}  # of this process: local copy → URL


def stands_for(place: Path, url: str) -> None:
    """Let ``origin`` know what a local file or folder is a copy of."""
    _origins[place] = shown(url)


def origin(path: str | Path) -> str:
    """What is written down of a file: of a local copy, or of what goes up, its URL; of anything else its path."""
    path = Path(path)
    for place in (path, *path.parents):
        if place in _origins:
            return "/".join([_origins[place], *path.relative_to(place).parts])
    return str(path)


@lru_cache(maxsize=64)
def fetched_model(url: str) -> Path:
    """A model's folder or file: as ``fetched``, and looked at once a process. Its name may hold no password."""
    refuse_keys(url)
    return fetched(url)


def _cached(store: Store) -> Path:
    return cache_folder() / "remote" / store.digest


def _skipped(name: str, skip: Collection[str]) -> bool:
    path = PurePosixPath(name)
    return any(part.startswith("checkpoint-") for part in path.parts) or any(path.match(pattern) for pattern in skip)


def _bring(
    files: Mapping[str, Mapping[str, Any]], sums: Mapping[str, str], folder: Path, at: Callable[[str], Store]
) -> None:
    """Download those of ``files`` (name → what the store says of it) that are not here as they are there."""
    noted = folder.parent / f"{folder.name}.versions.json"
    before = read_object(noted)
    versions = {name: hashlib.sha256(str(sorted(info.items())).encode()).hexdigest() for name, info in files.items()}
    for name, info in files.items():
        place = inside(folder, name)
        if before.get(name) != versions[name] or not place.exists():
            at(name).download(place, sums.get(name), info.get("size"))
            before = {**before, name: versions[name]}
            write_text(noted, json.dumps(before, indent=1))


def _link(folder: Path) -> None:
    """Make the links that a folder had where it was made."""
    for name, target in read_object(folder / LINKS).items():
        place = inside(folder, name)
        inside(folder, str(target))
        if not place.exists() and not place.is_symlink():
            place.symlink_to(target)


def inside(folder: Path, name: str) -> Path:
    """The place of ``name`` in ``folder``. Raises ``UserError`` where it would lie outside."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise UserError(f"{name!r}: a name from elsewhere that leads out of {folder}: nothing is read from there")
    return folder.joinpath(*parts)


def _sums(store: Store, needed: bool = True) -> dict[str, str]:
    """The checksums in a list of them, by name; empty where there is none.

    Unless it is ``needed`` a place that says another thing of it than "not found" has none: presigned URLs do, public
    buckets, and sites with a page for everything.
    """
    text = store.read_text(needed)
    found = {}
    for line in (text or "").splitlines():
        digest, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or not name:
            if not needed:
                log.warning(f"{store}: not a list of checksums as sha256sum writes it: it is not looked at")
                return {}
            raise UserError(f"{store}: not a list of checksums as sha256sum writes it: remove it")
        found[name] = digest
    return found


# -- writing


class Mirror:
    """A local folder whose finished files stand at a URL too.

    ``pull`` brings what another machine has finished, ``push`` sends what is finished here. What was last seen on both
    sides is noted beside the folder, so that a file that was removed here on purpose stays away, and one that another
    machine has replaced is brought again.

    Args:
        url: of the folder there.
        folder: the local one.
        unfinished: whether a file or folder, by its path here, is not to go up.
        sums: the name of the list of checksums there.
        last: of the files, this one goes up last.
    """

    def __init__(
        self, url: str, folder: Path, unfinished: Callable[[Path], bool], sums: str = SUMS, last: str = ""
    ) -> None:
        self.store, self.folder, self.unfinished, self.last = Store(url), folder, unfinished, last
        self.sums = self.store.inside(sums)
        self.noted = folder.parent / f"{folder.name}.sent.json"

    def pull(self) -> int:
        """Bring the finished files that this folder has not seen, each checked by its checksum; how many."""
        noted, brought = read_object(self.noted), 0
        for name, digest in _sums(self.sums).items():
            place = inside(self.folder, name)
            if noted.get(name, {}).get("sha256") == digest:
                continue
            if not place.is_file() or checksum_of_file(place) != digest:
                brought += 1
                self.store.inside(name).download(place, digest)
            noted[name] = _seen(place, digest)
            write_text(self.noted, json.dumps(noted, indent=1))
        _link(self.folder)
        return brought

    def push(self, exact: bool = False) -> None:
        """Send the finished files that do not stand there yet, then the list of all that do.

        ``exact``: what the list named and is not here is removed there.
        """
        noted, sums = read_object(self.noted), _sums(self.sums)
        links = {
            p.name: str(p.readlink()) for p in sorted(self.folder.iterdir()) if p.is_symlink() and p.name[0] != "."
        }
        if links and read_object(self.folder / LINKS) != links:
            write_text(self.folder / LINKS, json.dumps(links, indent=1) + "\n")
        before, here = dict(sums), set()
        for place in sorted(self.files(), key=lambda path: (path.name == self.last, path)):
            name = place.relative_to(self.folder).as_posix()
            here.add(name)
            digest = noted.get(name, {}).get("sha256", "")
            if noted.get(name) != _seen(place, digest) or sums.get(name) != digest:
                noted[name] = self._send(name, place, sums.get(name))
                sums[name] = noted[name]["sha256"]
                write_text(self.noted, json.dumps(noted, indent=1))
        gone = sorted(set(sums) - here) if exact else []
        sums = {name: digest for name, digest in sums.items() if name not in gone}
        if sums != before:
            listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
            self.sums.write_text(listed, self.folder)
        for name in gone:
            self.store.inside(name).remove()

    def _send(self, name: str, place: Path, there: str | None) -> dict[str, Any]:
        """Send a file, unless its checksum is that which is ``there``; what is noted of it.

        A small one is copied first: a log may grow while it is sent.
        """
        seen = _seen(place, "")
        copy = place.with_name(f".{place.name}.{os.getpid()}.up")
        try:
            sent = shutil.copyfile(place, copy) if seen["size"] < COPIED else place
            digest = checksum_of_file(sent)
            if digest != there:
                self.store.inside(name).upload(sent, digest, kept=place)
        finally:
            copy.unlink(missing_ok=True)
        return {**seen, "sha256": digest}

    def files(self) -> Iterable[Path]:
        """Every file here that is finished."""
        return self._finished(self.folder)

    def _finished(self, folder: Path) -> Iterable[Path]:
        for path in folder.iterdir():
            if path.name.startswith(".") or path.is_symlink() or self.unfinished(path):
                continue
            if path.is_dir():
                yield from self._finished(path)
            else:
                yield path


_mirrors: dict[Path, Mirror] = {}  # by their local folders, of this process


def mirror(made: Mirror) -> None:
    """Let ``push_finished`` know of a mirror."""
    _mirrors[made.folder] = made


def push_finished(folder: Path) -> None:
    """Send what is finished in a folder, where it lies in the local folder of a mirror; else nothing."""
    for place, made in _mirrors.items():
        if folder == place or place in folder.parents:
            made.push()


def _seen(place: Path, digest: str) -> dict[str, Any]:
    state = place.stat()
    return {"sha256": digest, "size": state.st_size, "time": state.st_mtime_ns}


# -- one file or folder


class Store:
    """One file or folder at a URL. Everything that fails is a ``UserError`` that names it, the reason and the cure."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self.protocol = url.partition("://")[0]
        self.name = PurePosixPath(shown(self.url).partition("://")[2]).name
        self.fs, self.path = self._try("opened", lambda: fsspec.core.url_to_fs(self.url))

    def __str__(self) -> str:
        return shown(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def digest(self) -> str:
        """What its copies are kept under."""
        return hashlib.sha256(re.sub("//[^/]*@", "//", self.url).encode()).hexdigest()[:24]

    def inside(self, name: str) -> Store:
        """What lies at ``name`` in this folder."""
        return self._at(f"{self.url}/{name}", f"{self.path.rstrip('/')}/{name}")

    def beside(self, name: str) -> Store:
        """What lies at ``name`` beside this."""
        head, query, rest = self.url.partition("?")
        return self._at(f"{head.rpartition('/')[0]}/{name}{query}{rest}", f"{self.path.rpartition('/')[0]}/{name}")

    def _at(self, url: str, path: str) -> Store:
        other = object.__new__(Store)
        other.url, other.protocol, other.fs, other.path = url, self.protocol, self.fs, path
        other.name = PurePosixPath(path.partition("?")[0]).name
        return other

    def info(self) -> dict[str, Any]:
        """What the store says of it. Raises ``UserError`` where it is not there."""
        return dict(self._try("read", lambda: self._fresh().info(self.path)))

    def exists(self) -> bool:
        return bool(self._try("read", lambda: self._fresh().exists(self.path)))

    def files(self) -> dict[str, dict[str, Any]]:
        """Every file of this folder: its name in the folder → what the store says of it."""
        found = self._try("listed", lambda: self._fresh().find(self.path, detail=True))
        start = self.path.strip("/")
        return {path.strip("/").removeprefix(start).strip("/"): dict(info) for path, info in sorted(found.items())}

    def read_text(self, needed: bool = True) -> str | None:
        """Its text; None where there is no such file, and, unless it is ``needed``, where it may not be read."""

        def read() -> str | None:
            try:
                return str(self._fresh().cat_file(self.path).decode("utf-8", "strict" if needed else "replace"))
            except FileNotFoundError:
                return None
            except Exception as error:
                if needed or not (isinstance(error, PermissionError) or getattr(error, "status", None) in FORBIDDEN):
                    raise
                return None

        return self._try("read", read)

    def write_text(self, text: str, scratch: Path) -> None:
        """Write a small text, by way of a file in the folder ``scratch``."""
        place = scratch / f".{self.name}.{os.getpid()}.up"
        try:
            write_text(place, text)
            self.upload(place, checksum_of_file(place))
        finally:
            place.unlink(missing_ok=True)

    def download(self, place: Path, digest: str | None, size: int | None = None) -> None:
        """Bring the file to ``place``, whole or not at all; its checksum, where known, and its size are checked."""

        def bring() -> None:
            with replacing(place) as temporary:
                self._fresh().get_file(self.path, str(temporary))
                if digest is not None and checksum_of_file(temporary) != digest:
                    raise _OtherContentError("what came does not fit its checksum")
                if size is not None and temporary.stat().st_size != size:
                    raise _OtherContentError(f"{temporary.stat().st_size} bytes came of {size}")

        self._try("read", bring)

    def upload(self, place: Path, digest: str, kept: Path | None = None) -> None:
        """Send a file whole, and read it back: its checksum there is ``digest``.

        ``kept``: where it lies, for the message that it could not be sent.
        """

        def send() -> None:
            fs, whole = self._fresh(), self.protocol in WHOLE_PUTS
            parent, _, name = self.path.rpartition("/")
            target = self.path if whole else f"{parent}/.{name}.{os.uname().nodename}-{os.getpid()}.up"
            if not whole:  # an object store has no folders, and would make a bucket
                fs.makedirs(parent, exist_ok=True)
            fs.put_file(str(place), target)
            if self._checksum(target) != digest:
                fs.rm_file(target)
                raise _OtherContentError("what arrived does not fit its checksum")
            if not whole:
                if fs.exists(self.path):
                    fs.rm_file(self.path)
                fs.mv(target, self.path)

        self._try("written", send, f". Nothing is lost: what was to go there lies whole at {kept}" if kept else "")

    def check_writable(self, scratch: Path) -> None:
        """Refuse, before any work, a place that cannot be written; an empty file is put there and taken away."""
        scratch.mkdir(parents=True, exist_ok=True)
        probe = self.beside(f".{self.name}.{os.uname().nodename}-{os.getpid()}.probe")
        place = scratch / ".probe"
        place.write_bytes(b"")
        try:
            probe.upload(place, checksum_of_file(place))
        finally:
            place.unlink()
        self._try("written", lambda: self.fs.rm_file(probe.path))

    def remove(self) -> None:
        """Take the file away, where it is there."""

        def take() -> None:
            if self._fresh().exists(self.path):
                self.fs.rm_file(self.path)

        self._try("removed", take)

    def _checksum(self, path: str) -> str:
        digest = hashlib.sha256()
        self._fresh()
        with self.fs.open(path, "rb", block_size=BLOCK) as file:
            while block := file.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def _fresh(self) -> Any:
        """The file system, without what it remembers of folders."""
        self.fs.invalidate_cache()
        return self.fs

    def _try(self, done: str, work: Callable[[], T], kept: str = "") -> T:
        """What ``work`` returns; tried again where another attempt may help.

        Raises:
            UserError: ``self`` cannot be ``done``, and why; with ``kept`` behind it.
        """
        for pause in (*PAUSES, None):
            try:
                return work()
            except UserError:
                raise
            except Exception as error:
                if isinstance(error, OURS):
                    raise
                cure = _cure(error, self.protocol)
                if cure or pause is None:
                    cure = cure or "see that it can be reached and run the same command again"
                    reason = " ".join(str(error).split()) or type(error).__name__
                    message = f"{self}: cannot be {done}: {reason}: {cure}{kept}"
                    raise UserError(_without_keys(message, self.url)) from None
                log.warning(_without_keys(f"{self}: not {done} ({error}): tried again", self.url))
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


class _OtherContentError(Exception):
    """What arrived is not what was sent."""


def _cure(error: Exception, protocol: str) -> str:
    """How the user mends what no other attempt will; empty where one may help."""
    import fsspec

    names = {type(error).__name__, str(getattr(error, "response", ""))}
    if isinstance(error, ImportError):
        return "pip install 'rrhf[s3]'" if protocol in ("s3", "s3a") else "install the package that it names"
    if isinstance(error, ValueError) and "rotocol not known" in str(error):
        return nearest(protocol, fsspec.available_protocols())
    if any(re.search(CREDENTIALS, name) for name in names) or re.search(CREDENTIALS, str(error)):
        return "give credentials that may use it: of S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, PermissionError):
        return "give credentials that may use it: of S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, FileNotFoundError):
        return "no such file, folder or bucket: check the name"
    if isinstance(error, NotImplementedError):
        return "this kind of place does not offer that: choose another"
    return ""


def _without_keys(text: str, url: str) -> str:
    """A message without what the URL and the environment hold of keys."""
    authority = re.search(r"//([^/]*)@", url)
    parts = authority[1].split(":") if authority else []
    keys = [*(os.environ.get(name, "") for name in SECRETS), *parts, url.partition("?")[2]]
    if authority:
        text = text.replace(authority[0], "//")
    for key in sorted((key for key in keys if len(key) > 3), key=len, reverse=True):  # a shorter one is in many a word
        text = text.replace(key, "…")
    return text
