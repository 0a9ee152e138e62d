"""Work in parts: whatever is interrupted, and wherever, the file that comes out is that of an undisturbed run."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from rrhf.common import files
from rrhf.common.errors import UserError
from rrhf.records import files as record_files
from rrhf.records import parquet, parts
from rrhf.records.parts import in_parts
from rrhf.records.record import Record
from support import tiny

SETTINGS = {"policy": "top-p", "seed": 1}
STEPS = {  # the functions whose every line is a moment to die at
    parts.__file__: None,
    files.__file__: None,
    record_files.__file__: {"write_records", "join_records", "_write_lines", "_write_jsonl", "_write_jsonl_gz"},
    parquet.__file__: {"write_parquet"},
}


def queries(count: int = 7) -> Iterator[Record]:
    return (Record(f"query {i}") for i in range(count))


def answer(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
    """One response a record, drawn from its query alone."""
    for record in block:
        record.responses.append(record.query[::-1])
        record.sources.append("greedy/0")
        record.finish.append("stop")
        yield record
        done(1)


def run(output: Path, **options: Any) -> int:
    options = {"records": queries, "settings": SETTINGS, "part_size": 3, **options}
    steps = options.pop("steps", {"answer": options.pop("work", answer)})
    return in_parts(options.pop("records"), output, steps, options.pop("settings"), **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """The bytes of a run that nothing stopped, by suffix."""
    folder, made = tmp_path_factory.mktemp("undisturbed"), {}

    def content(suffix: str) -> bytes:
        if suffix not in made:
            run(folder / f"out{suffix}")
            assert [p.name for p in folder.iterdir() if p.name == f"out{suffix}.parts"] == []
            made[suffix] = (folder / f"out{suffix}").read_bytes()
            written = list(record_files.read_records(folder / f"out{suffix}"))
            assert [(r.query, r.responses, r.sources) for r in written] == [
                (f"query {i}", [f"{i} yreuq"], ["greedy/0"]) for i in range(7)
            ]
        return made[suffix]

    return content


def forks() -> tiny.Forks:
    return tiny.forks("records.test_parts", "pyarrow.parquet")


def child(function: Callable[..., None], *arguments: Any, **options: Any) -> int:
    """Run one of the functions below in a process of its own; its exit code, or minus the signal that ended it."""
    return forks()(f"records.test_parts:{function.__name__}", *arguments, **options).code


def undisturbed_run(output: str) -> None:
    run(Path(output))


def run_killed_at_line(number: int, output: str, overwrite: bool = False) -> None:
    with at_line(number):
        run(Path(output), overwrite=overwrite)


def run_killed_at_query(query: str, output: str, overwrite: bool = False) -> None:
    """The process dies in the work on the part that begins with ``query``."""

    def dies(block: list[Record], progress: Callable[[int], None]) -> Iterator[Record]:
        if block[0].query == query:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from answer(block, progress)

    run(Path(output), work=dies, overwrite=overwrite)


@contextmanager
def at_line(number: int) -> Iterator[list[str]]:
    """Kill this process before it runs the n-th line of the code that writes (0: never); the list gets every line."""
    lines: list[str] = []

    def watch(frame: FrameType, event: str, argument: object) -> Any:
        if not _watched(frame.f_code):
            return None
        if event == "line":
            lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(lines) == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return watch

    sys.settrace(watch)
    try:
        yield lines
    finally:
        sys.settrace(None)


def _watched(code: CodeType) -> bool:
    if code.co_filename not in STEPS:
        return False
    names = STEPS[code.co_filename]
    return names is None or code.co_name in names


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_killed_at_every_line_and_run_again(suffix: str, undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    """In work, before and after each write, fsync and rename, in the manifest, while joining and while clearing up."""
    with at_line(0) as lines:
        run(tmp_path / f"whole{suffix}")
    moments = range(1, len(lines) + 1)
    if not tiny.LONG:  # every distinct line once, and a sample of the rest
        first = {line: moment for moment, line in reversed(list(zip(moments, lines)))}
        others = random.Random(0).sample(moments, 30 if suffix == ".jsonl" else 10)
        joining = [m for line, m in first.items() if line.startswith("records")]
        moments = sorted({*(first.values() if suffix == ".jsonl" else joining), *others})  # type: ignore[assignment]
    for moment in moments:
        folder = tmp_path / str(moment)
        output = folder / f"out{suffix}"
        folder.mkdir()
        assert child(run_killed_at_line, moment, str(output)) == -signal.SIGKILL
        standing = output.exists()
        if standing:
            assert output.read_bytes() == undisturbed(suffix), lines[moment - 1]
        if standing and not output.with_name(output.name + ".parts").exists():
            with pytest.raises(UserError, match="exists already"):  # it was complete
                run(output)
        else:
            run(output)
        assert output.read_bytes() == undisturbed(suffix), lines[moment - 1]
        assert os.listdir(folder) == [output.name], lines[moment - 1]  # noqa: PTH208


def test_killed_again_and_again(undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    """Every attempt gets a little further, or at least loses nothing."""
    output, moments = tmp_path / "out.jsonl", random.Random(4)
    for _ in range(12):
        if child(run_killed_at_line, moments.randrange(1, 250), str(output)) == 0:
            break
    if not output.exists():
        run(output)
    assert output.read_bytes() == undisturbed(".jsonl")


@pytest.mark.parametrize(
    "call", ["os:fsync", "os:replace", "shutil:rmtree", "rrhf.records.parts_folder:checksum_of_file"]
)
def test_killed_at_each_call_to_the_system(call: str, undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    number = killed = 0
    while number == killed:
        number += 1
        output = tmp_path / str(number) / "out.jsonl"
        code = child(undisturbed_run, str(output), faults=[tiny.die(call, number)])
        killed += code == -signal.SIGKILL
        if code and output.with_name("out.jsonl.parts").exists():
            run(output)
        elif code:
            with pytest.raises(UserError, match="exists already"):  # it was complete
                run(output)
        assert output.read_bytes() == undisturbed(".jsonl")
        assert os.listdir(output.parent) == ["out.jsonl"]  # noqa: PTH208
    assert killed >= 1


def test_finished_parts_are_not_done_again(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert child(run_killed_at_query, "query 6", str(output)) == -signal.SIGKILL
    blocks, work = counting()
    run(output, work=work)
    assert blocks == [6]


# --- what stands on the disk -----------------------------------------------------------------------------------------


def unfinished(output: Path) -> Path:
    """Two of three parts stand; the third failed."""

    def fails(block: list[Record], progress: Callable[[int], None]) -> Iterator[Record]:
        if block[0].query == "query 6":
            raise KeyboardInterrupt
        return answer(block, progress)

    with pytest.raises(KeyboardInterrupt):
        run(output, work=fails)
    return output.with_name(output.name + ".parts")


def counting() -> tuple[list[int], parts.Work]:
    """A work function and the first numbers of the blocks it was given."""
    blocks: list[int] = []

    def work(block: list[Record], progress: Callable[[int], None]) -> Iterable[Record]:
        blocks.append(int(str(block[0].query).split()[1]))
        return answer(block, progress)

    return blocks, work


def damage_bytes(folder: Path) -> None:
    part = folder / "part-0000001.jsonl"
    part.write_bytes(part.read_bytes().replace(b"yreuq", b"YREUQ", 1))


def damage_empty(folder: Path) -> None:
    (folder / "part-0000001.jsonl").write_bytes(b"")


def damage_gone(folder: Path) -> None:
    (folder / "part-0000001.jsonl").unlink()


def damage_swapped(folder: Path) -> None:
    (folder / "part-0000001.jsonl").write_bytes((folder / "part-0000000.jsonl").read_bytes())


@pytest.mark.parametrize("damage", [damage_bytes, damage_empty, damage_gone, damage_swapped])
def test_a_damaged_part_is_done_again(
    damage: Callable[[Path], None], undisturbed: Callable[[str], bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    damage(unfinished(output))
    blocks, work = counting()
    run(output, work=work)
    assert blocks == [3, 6]
    assert output.read_bytes() == undisturbed(".jsonl")


def test_a_manifest_torn_at_any_byte(undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    manifest = unfinished(tmp_path / "model.jsonl") / "manifest-00000.jsonl"
    whole = manifest.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole) + 1, 1 if tiny.LONG else 7):
        output = tmp_path / str(length) / "out.jsonl"
        torn = unfinished(output) / "manifest-00000.jsonl"
        assert torn.read_bytes() == whole
        torn.write_bytes(whole[:length])
        blocks, work = counting()
        run(output, work=work)
        assert blocks == ([3, 6] if length < len(whole) - 1 else [6])
        assert output.read_bytes() == undisturbed(".jsonl")


def test_entries_after_a_torn_line_count(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    manifest = unfinished(output) / "manifest-00000.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    assert child(run_killed_at_query, "query 6", str(output)) == -signal.SIGKILL  # it did the torn entry's part
    blocks, work = counting()
    run(output, work=work)
    assert blocks == [6]


@pytest.mark.parametrize("number", ["1e999", "NaN", "[]", '"x"', "null"])
def test_an_entry_whose_number_is_none_does_not_count(
    number: str, undisturbed: Callable[[str], bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    manifest = unfinished(output) / "manifest-00000.jsonl"
    manifest.write_text(manifest.read_text().replace('"part": 0', f'"part": {number}'))
    blocks, work = counting()
    run(output, work=work)
    assert blocks == [0, 6]
    assert output.read_bytes() == undisturbed(".jsonl")


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    unfinished(output)
    with pytest.raises(UserError) as raised:
        run(output, settings={"policy": "top-p", "seed": 2, "top_p": 0.9})
    for words in ("seed was 1, is 2", "top_p was None, is 0.9", "out.jsonl.parts", "--overwrite"):
        assert words in str(raised.value)
    assert "policy" not in str(raised.value)
    run(output, settings={"policy": "top-p", "seed": 2}, overwrite=True)
    assert len(output.read_text().splitlines()) == 7


def test_parts_of_other_input_are_done_again(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    unfinished(output)
    blocks, work = counting()
    changed = [Record(f"query {i + 100 * (i == 4)}") for i in range(8)]
    run(output, work=work, records=lambda: changed)
    assert blocks == [3, 6]
    assert [row["query"] for row in tiny.read_rows(output)] == [record.query for record in changed]


def test_parts_of_another_size_are_done_again(undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    unfinished(output)
    run(output, part_size=5)
    assert output.read_bytes() == undisturbed(".jsonl")


# --- the output ------------------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(UserError, match=r"out\.jsonl exists already: give --overwrite"):
        run(output)
    assert output.read_text() == "mine\n"
    assert os.listdir(tmp_path) == ["out.jsonl"]  # noqa: PTH208


def test_overwrite_replaces_at_the_very_end(undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")

    def work(block: list[Record], progress: Callable[[int], None]) -> Iterator[Record]:
        assert output.read_text() == "mine\n"
        return answer(block, progress)

    run(output, work=work, overwrite=True)
    assert output.read_bytes() == undisturbed(".jsonl")


@pytest.mark.parametrize("moment", range(60, 400, 1 if tiny.LONG else 31))
def test_overwrite_killed_and_run_again(moment: int, undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    """What stood there stays until the new file is whole; without the flag it is never taken for the new one."""
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    code = child(run_killed_at_line, moment, str(output), True)
    assert output.read_bytes() in ([b"mine\n", undisturbed(".jsonl")] if code else [undisturbed(".jsonl")])
    if output.read_text() == "mine\n":
        with pytest.raises(UserError, match="exists already"):
            run(output)
        assert output.read_text() == "mine\n"
        run(output, overwrite=True)
    assert output.read_bytes() == undisturbed(".jsonl")


def test_overwrite_goes_on_where_it_was_stopped(undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    assert child(run_killed_at_query, "query 6", str(output), True) == -signal.SIGKILL
    blocks, work = counting()
    run(output, work=work, overwrite=True)
    assert blocks == [6]
    assert output.read_bytes() == undisturbed(".jsonl")


def test_no_record_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record"):
        run(tmp_path / "out.jsonl", records=lambda: [])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made.*--output"):
        run(tmp_path / "file" / "out.jsonl")


@pytest.mark.parametrize("name", ["/proc/out.jsonl", "link/out.jsonl", "link/deeper/out.jsonl"])
def test_a_folder_that_can_never_be_made(name: str, tmp_path: Path) -> None:
    """It looks as one does that another process removes again and again."""
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"out.jsonl.parts: cannot be made: .*--output"):
        run(tmp_path / name)


# --- several processes -----------------------------------------------------------------------------------------------


def process(rank: int, world: int = 3) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world)}


def test_three_processes_give_the_same_file(undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    """Started together; each has a part of its own, so none can find the output joined before it began."""
    output = tmp_path / "out.jsonl"
    started = [forks().start("records.test_parts:undisturbed_run", str(output), env=process(rank)) for rank in range(3)]
    assert [forks().wait(one).code for one in started] == [0, 0, 0]
    assert output.read_bytes() == undisturbed(".jsonl")
    assert os.listdir(tmp_path) == ["out.jsonl"]  # noqa: PTH208


def run_held(hold: str, output: str, blocks: str) -> None:
    """Stop in the first part until the other process is in one too, then die there; the test hears when it is so."""

    def work(block: list[Record], progress: Callable[[int], None]) -> Iterator[Record]:
        Path(hold, "entered").open("w").close()
        Path(hold, "met").read_text()
        os.kill(os.getpid(), signal.SIGKILL)
        return answer(block, progress)

    run(Path(output), work=work)


def run_meeting(hold: str, output: str, blocks: str) -> None:
    def work(block: list[Record], progress: Callable[[int], None]) -> Iterator[Record]:
        with Path(blocks).open("a") as file:
            first = not file.tell()
            file.write(f"{block[0].query}\n")
        if first:
            Path(hold, "met").open("w").close()
        return answer(block, progress)

    run(Path(output), work=work)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_do_what_a_dead_process_left(
    victim: int, undisturbed: Callable[[str], bytes], tmp_path: Path
) -> None:
    """One dies with a part in its hands, while another is past that part: nobody waits for it, and nothing is lost."""
    output, blocks = tmp_path / "out.jsonl", tmp_path / "blocks"
    for name in ("entered", "met"):
        os.mkfifo(tmp_path / name)
    arguments = (str(tmp_path), str(output), str(blocks))
    dying = forks().start("records.test_parts:run_held", *arguments, env=process(victim, 2))
    (tmp_path / "entered").read_text()
    left = forks().start("records.test_parts:run_meeting", *arguments, env=process(1 - victim, 2))
    assert forks().wait(dying).code == -signal.SIGKILL
    assert forks().wait(left).code == 0
    assert sorted(blocks.read_text().splitlines()) == ["query 0", "query 3", "query 6"]
    assert output.read_bytes() == undisturbed(".jsonl")


def test_all_are_killed_and_any_number_finishes(undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    for world in (1, 2):
        output = tmp_path / str(world) / "out.jsonl"
        arguments = ("records.test_parts:run_killed_at_query", "query 6", str(output))
        started = [forks().start(*arguments, env=process(rank)) for rank in range(3)]
        assert -signal.SIGKILL in [forks().wait(one).code for one in started]
        assert not output.exists()
        codes = [child(undisturbed_run, str(output), env=process(rank, world)) for rank in range(world)]
        assert codes == [0] * world  # also the one that comes when the other has joined them
        assert output.read_bytes() == undisturbed(".jsonl")


def overwriting_run(output: str) -> None:
    run(Path(output), overwrite=True)


def test_who_comes_when_all_is_done(tmp_path: Path) -> None:
    """Whether the output was written since a process began tells it if the others were done or it stood there before.

    With an output from before, the first process refuses for all.
    """
    output = tmp_path / "out.jsonl"
    for when, codes in ((4e9, (0, 0)), (1e9, (2, 0))):
        output.write_text("mine\n")
        os.utime(output, (when, when))
        assert tuple(child(undisturbed_run, str(output), env=process(rank)) for rank in (0, 1)) == codes
        assert output.read_text() == "mine\n"
    os.utime(output, (4e9, 4e9))
    assert [child(overwriting_run, str(output), env=process(rank)) for rank in (0, 1)] == [0, 0]
    assert output.read_text() == "mine\n"
    assert child(undisturbed_run, str(output), env=process(0, 1)) == 2  # one process alone asks nobody


def run_after_the_clock_was_put(output: str, seconds: int) -> None:
    now = time.time
    time.time = lambda: now() + seconds
    undisturbed_run(output)


def test_who_comes_when_all_is_done_and_the_clock_was_put_forward(tmp_path: Path) -> None:
    """What the others wrote ten minutes after all began is theirs, and what is older is not, whatever the hour now."""
    output = tmp_path / "out.jsonl"
    for since, seconds, code in ((600, 3600, 0), (600, 10**8, 0), (-600, 3600, 2), (-600, -3600, 2)):
        output.write_text("mine\n")
        os.utime(output, (when := time.time() + since, when))
        assert child(run_after_the_clock_was_put, str(output), seconds, env=process(0)) == code
        assert output.read_text() == "mine\n"


def test_three_processes_overwrite(undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    """What was begun with other settings is cleared away once, before anybody works."""
    for attempt in range(5):
        output = tmp_path / str(attempt) / "out.jsonl"
        unfinished(output)
        settings = output.with_name("out.jsonl.parts") / "settings.json"
        settings.write_text(settings.read_text().replace("top-p", "greedy"))
        output.write_text("mine\n")
        os.utime(output, (1e9, 1e9))
        started = [
            forks().start("records.test_parts:overwriting_run", str(output), env=process(rank)) for rank in range(3)
        ]
        ended = [forks().wait(one) for one in started]
        assert [one.code for one in ended] == [0, 0, 0], ended
        assert output.read_bytes() == undisturbed(".jsonl")
        assert os.listdir(output.parent) == ["out.jsonl"]  # noqa: PTH208


def test_a_folder_that_goes_while_it_is_made(
    undisturbed: Callable[[str], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mkdir(exist_ok=True) finds it, looks whether it is a folder, and by then another process has removed it."""
    made, gone = Path.mkdir, []

    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        if self.name == "out.jsonl.parts" and not gone:
            gone.append(self)
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        made(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    run(tmp_path / "out.jsonl")
    assert gone and (tmp_path / "out.jsonl").read_bytes() == undisturbed(".jsonl")


def test_parts_without_settings_count_for_nothing(undisturbed: Callable[[str], bytes], tmp_path: Path) -> None:
    """A process died while it cleared parts away that other settings had made."""
    output = tmp_path / "out.jsonl"
    (unfinished(output) / "settings.json").unlink()
    blocks, work = counting()
    run(output, work=work)
    assert blocks == [0, 3, 6]
    assert output.read_bytes() == undisturbed(".jsonl")


# --- several steps, and what is counted ------------------------------------------------------------------------------


def chain(counts: Counter[str]) -> dict[str, parts.Work]:
    def twice(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        for record in answer(block, done):
            record.responses = [text * 2 for text in record.responses]
            counts["doubled"] += 1
            yield record

    def odd(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        for record in block:
            done(1)
            counts[f"of the last step, {len(record.responses)} response"] += 1
            if int(str(record.query)[-1]) % 2:
                yield record

    return {"twice": twice, "odd": odd}


def run_chain(output: str, number: int = 0, said: str = "") -> None:
    counts: Counter[str] = Counter()
    with at_line(number):
        run(Path(output), steps=chain(counts), counts=counts)
    if said:
        Path(said).write_text(json.dumps(counts))


COUNTED = {"doubled": 7, "of the last step, 1 response": 7}


@pytest.mark.parametrize("world", [1, 3])
def test_steps_and_counts_of_any_number_of_processes(world: int, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    arguments = [(str(output), 0, str(tmp_path / f"said-{rank}")) for rank in range(world)]
    started = [
        forks().start("records.test_parts:run_chain", *arguments[rank], env=process(rank, world))
        for rank in range(world)
    ]
    assert [forks().wait(one).code for one in started] == [0] * world
    rows = tiny.read_rows(output)
    assert [(row["query"], row["responses"]) for row in rows] == [(f"query {i}", [f"{i} yreuq" * 2]) for i in (1, 3, 5)]
    assert json.loads((tmp_path / "said-0").read_text()) == COUNTED


def test_steps_killed_and_run_again(tmp_path: Path) -> None:
    """The file and the counts are those of an undisturbed run, whichever parts of whichever step stood."""
    with at_line(0) as lines:
        run(tmp_path / "whole.jsonl", steps=chain(Counter()))
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for moment in random.Random(1).sample(range(1, len(lines)), 200 if tiny.LONG else 25):
        output, counts = tmp_path / str(moment) / "out.jsonl", Counter[str]()
        assert child(run_chain, str(output), moment) == -signal.SIGKILL
        if output.exists():
            continue  # joined before it died: nothing is left to count
        run(output, steps=chain(counts), counts=counts)
        assert output.read_bytes() == whole, lines[moment - 1]
        assert counts == COUNTED, lines[moment - 1]


def test_a_step_is_done_again_where_the_one_before_it_was(tmp_path: Path) -> None:
    output, counts = tmp_path / "out.jsonl", Counter[str]()
    steps = chain(counts)

    def fails(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        if block[0].query == "query 6":
            raise KeyboardInterrupt
        return iter(list(steps["odd"](block, done)))

    with pytest.raises(KeyboardInterrupt):
        run(output, steps={"twice": steps["twice"], "odd": fails}, counts=counts)
    part = output.with_name("out.jsonl.parts") / "step-0-part-0000000.jsonl"
    part.write_bytes(part.read_bytes()[:-1])
    seen, odd = counting()
    run(output, steps={"twice": steps["twice"], "odd": odd}, counts=counts)
    assert seen == [6]  # what it made again is what stood there: the next step's first part is still good


# --- memory ----------------------------------------------------------------------------------------------------------


MANY = """
import sys
from pathlib import Path
from rrhf.records.parts import in_parts
from rrhf.records.record import Record

def work(block, done):
    for record in block:
        record.responses, record.sources, record.finish = ["a response"] * 4, ["top-p/0"] * 4, ["stop"] * 4
        yield record

def count(number, name):
    records = lambda: (Record(f"the query number {i}") for i in range(number))
    return in_parts(records, Path(name), {"work": work}, {}, part_size=2000)

def peak():
    # VmHWM begins with this program; ru_maxrss would begin with what the test process held when it started this one.
    status = Path("/proc/self/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))

before = peak()
assert count(20_000, "few.jsonl") == 20_000
few = peak()
assert count(int(sys.argv[1]), "many.jsonl") == int(sys.argv[1])
print(before, few, peak())
"""


def test_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    number = 1_000_000 if tiny.LONG else 100_000
    found = subprocess.run(
        [sys.executable, "-c", MANY, str(number)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    _, few, many = (int(kilobytes) / 1024 for kilobytes in found.stdout.split())
    assert many < 1024
    assert many - few < (200 if tiny.LONG else 40)  # the ids of all records, 8 bytes each, and their table
    with (tmp_path / "many.jsonl").open(encoding="utf-8") as file:
        assert sum(1 for _ in file) == number


def test_the_manifest_says_what_it_says(tmp_path: Path) -> None:
    import hashlib

    folder = unfinished(tmp_path / "out.jsonl")
    entries = tiny.read_rows(folder / "manifest-00000.jsonl")
    assert [entry["part"] for entry in entries] == [0, 1]
    for entry in entries:
        content = (folder / f"part-{entry['part']:07d}.jsonl").read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert json.loads((folder / "settings.json").read_text())["settings"] == SETTINGS
