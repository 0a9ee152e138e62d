"""Files at URLs: brought and sent whole, by checksum; what fails says how to mend it, and tells no key."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rrhf.common import remote
from rrhf.common.errors import UserError
from rrhf.common.files import checksum_of_file
from rrhf.common.remote import SUMS, Mirror, Store, fetched, is_url, refuse_keys, shown


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty memory file system, an empty cache, and no waiting between attempts."""
    monkeypatch.setenv("RRHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def sums(*texts: tuple[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(text).hexdigest()}  {name}\n" for name, text in texts).encode()


def local_folder(tmp_path: Path, **files: str) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def never(path: Path) -> bool:
    return False


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/a.jsonl") and is_url("memory://a")
    assert not any(map(is_url, ("a/b.jsonl", "package:llm/x.gguf", "judge:a.yaml", "https:/x", Path("s3://b/x"))))
    assert fetched("a/b.jsonl") == Path("a/b.jsonl") and fetched("file:///a/b") == Path("/a/b")


def test_a_file_is_downloaded_once_and_again_where_it_changed(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []
    download = Store.download
    monkeypatch.setattr(Store, "download", lambda self, *rest: (downloads.append(self.name), download(self, *rest)))
    place.pipe("/data/a.txt", b"one")
    assert [fetched("memory://data/a.txt").read_bytes() for _ in range(2)] == [b"one", b"one"]
    place.pipe("/data/a.txt", b"two")
    assert fetched("memory://data/a.txt").read_bytes() == b"two" and downloads == ["a.txt", "a.txt"]


@pytest.mark.parametrize("fault", ["forbidden", "a page", "bytes"])
def test_a_place_that_has_no_list_may_say_so_in_its_own_way(
    place: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    place.pipe("/data/a.txt", b"one")
    read = type(place).cat_file

    def answers(self: Any, path: str, *rest: Any, **options: Any) -> bytes:
        if not path.endswith(".sha256"):
            return bytes(read(self, path, *rest, **options))
        if fault == "forbidden":
            raise PermissionError("Forbidden")
        return b"<html>nothing here</html>" if fault == "a page" else b"\xff\xfe"

    monkeypatch.setattr(type(place), "cat_file", answers)
    assert fetched("memory://data/a.txt").read_bytes() == b"one"


def test_a_cache_that_cannot_be_written_is_said(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.pipe("/data/a.txt", b"one")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RRHF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        fetched("memory://data/a.txt")


def test_two_processes_may_fetch_one_folder(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for number in range(8):
        (there / f"{number}.bin").write_bytes(bytes([number]) * 300_000)
    program = (
        "import sys, time, fsspec\n"
        "from fsspec.implementations.local import LocalFileSystem\n"
        "class Slow(LocalFileSystem):\n"
        "    protocol = 'slow'\n"
        "    def get_file(self, *a, **k):\n"
        "        for _ in range(3): super().get_file(*a, **k)\n"
        "fsspec.register_implementation('slow', Slow)\n"
        "from rrhf.common.remote import fetched\n"
        f"found = fetched('slow://{there}')\n"
        "assert sorted(p.name for p in found.iterdir() if p.suffix) == [f'{n}.bin' for n in range(8)]\n"
        "assert all((found / f'{n}.bin').stat().st_size == 300_000 for n in range(8))\n"
    )
    environment = {**os.environ, "RRHF_CACHE": str(tmp_path / "cache")}
    both = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for one in both:
        assert one.communicate()[1] == "" and one.returncode == 0


def test_a_folder_comes_whole_without_checkpoints_and_loses_what_is_no_more_there(place: Any) -> None:
    for name in ("config.json", "sub/weights.safetensors", "checkpoint-2/weights.safetensors"):
        place.pipe(f"/model/{name}", name.encode())

    def found(**options: Any) -> set[str]:
        folder = fetched("memory://model", **options)
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    assert found(skip=["*.safetensors"]) == {"config.json"}
    assert found() == {"config.json", "sub/weights.safetensors"}
    place.rm("/model/config.json")
    assert found() == {"sub/weights.safetensors"}


@pytest.mark.parametrize("url", ["memory://data/a.txt", "memory://data"])
def test_a_wrong_checksum_is_noticed(place: Any, url: str) -> None:
    place.pipe("/data/a.txt", b"changed")
    place.pipe("/data/a.txt.sha256", sums(("a.txt", b"as it was")))
    place.pipe(f"/data/{SUMS}", sums(("a.txt", b"as it was")))
    with pytest.raises(UserError, match=r"a\.txt: cannot be read: what came does not fit its checksum"):
        fetched(url)
    assert not list((remote.cache_folder()).rglob("a.txt"))


def test_what_arrives_changed_is_sent_again_and_else_kept_here(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = local_folder(tmp_path, result="good")
    attempts: list[int] = []

    def put_file(self: Any, source: str, target: str, **rest: Any) -> None:
        attempts.append(1)
        self.pipe(target, b"bad" if len(attempts) < bad else Path(source).read_bytes())

    monkeypatch.setattr(type(place), "put_file", put_file)
    bad = 3  # the third attempt arrives as it was
    Store("memory://out/result").upload(folder / "result", checksum_of_file(folder / "result"))
    assert place.cat("/out/result") == b"good" and len(attempts) == 3
    place.rm("/out", recursive=True)
    attempts, bad = [], 9
    with pytest.raises(UserError, match=r"Nothing is lost: what was to go there lies whole at .*result"):
        Mirror("memory://out", folder, never).push()
    assert not place.exists("/out/result")  # nothing half-sent stands under its name


def test_a_mirror_sends_what_is_finished_and_brings_it_to_an_empty_disk(place: Any, tmp_path: Path) -> None:
    here = local_folder(tmp_path, a="1", b="2")
    (here / "b.parts").mkdir()
    (here / "link").symlink_to("a")

    def unfinished(path: Path) -> bool:
        return path.name.endswith(".parts")

    Mirror("memory://run", here, unfinished).push()
    assert {path.rpartition("/")[2] for path in place.find("/run")} == {"a", "b", SUMS, "links.json"}
    there = tmp_path / "there"
    there.mkdir()
    elsewhere = Mirror("memory://run", there, unfinished)
    assert elsewhere.pull() == 3 and (there / "a").read_text() == "1" and (there / "link").readlink() == Path("a")
    assert elsewhere.pull() == 0
    (there / "b").write_text("3", encoding="utf-8")
    elsewhere.push()
    (here / "a").unlink()  # on purpose, to make it anew: it does not come back
    Mirror("memory://run", here, unfinished).pull()
    assert (here / "b").read_text() == "3" and not (here / "a").exists()
    place.pipe("/run/b", b"4")
    (tmp_path / "third").mkdir()
    with pytest.raises(UserError, match="does not fit its checksum"):
        Mirror("memory://run", tmp_path / "third", unfinished).pull()


def test_an_unchanged_file_is_not_sent_again(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = local_folder(tmp_path, a="1")
    Mirror("memory://run", here, never).push()
    monkeypatch.setattr(Store, "upload", None)
    Mirror("memory://run", here, never).push()


def test_a_log_may_grow_while_it_is_sent(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = local_folder(tmp_path, log="a line\n")
    put_file = type(place).put_file

    def grows(self: Any, source: str, target: str, **rest: Any) -> None:
        with (here / "log").open("a") as log:
            log.write("another\n")
        put_file(self, source, target, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(place), "put_file", grows)
        Mirror("memory://run", here, never).push()
    assert place.cat("/run/log") == b"a line\n"
    Mirror("memory://run", here, never).push()
    assert place.cat("/run/log") == (here / "log").read_bytes() and {p.name for p in here.iterdir()} == {"log"}


def test_names_from_elsewhere_do_not_leave_the_folder(place: Any, tmp_path: Path) -> None:
    place.pipe("/run/x", b"1")
    for name in ("../x", "/x", "a/../../x"):
        place.pipe(f"/run/{SUMS}", sums((name, b"1")))
        with pytest.raises(UserError, match="leads out of"):
            Mirror("memory://run", tmp_path, never).pull()


def test_faults_say_how_to_mend_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean 'memory'"):
        fetched("memori://a/b")
    with pytest.raises(UserError, match="no such file, folder or bucket: check the name"):
        fetched("memory://nowhere/b.jsonl")

    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"pip install 'rrhf\[s3\]'"):
        fetched("s3://bucket/a")


def test_no_message_tells_a_key(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")

    def fails(url: str) -> None:
        raise OSError(f"no answer of {url} with planted-secret")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fails)
    url = "ftp://user:planted-password@host/a.jsonl?token=planted-token"
    with pytest.raises(UserError) as caught:
        fetched(url)
    told = str(caught.value) + caplog.text + shown(url)
    assert "host/a.jsonl" in told and "planted" not in told and "user" not in told
    assert caught.value.__suppress_context__
    with pytest.raises(UserError, match="give them by the environment") as caught:
        refuse_keys(url)
    assert "planted" not in str(caught.value)
    refuse_keys("s3://bucket/model")
