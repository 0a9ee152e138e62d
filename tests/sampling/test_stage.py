"""``rrhf sample`` as a user runs it: mixtures, several processes, killed and run again, a million queries."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import misbehaving as bad
from support import tiny
from support.ports import closed_port
from support.tiny import die, warm

KEY = "sk-test-90ab4f1c9a7be2d8"
SIZES = ("--max_new_tokens", "6", "--batch_size", "1", "--device", "cpu", "--dtype", "float32", "--seed", "3")
QUERIES = 10  # three parts of at most four


@pytest.fixture(scope="module")
def server() -> Iterator[bad.Misbehaving]:
    pytest.importorskip("openai")
    with bad.misbehaving() as running:
        yield running


def workplace(folder: Path, model: Path) -> Path:
    """Queries, two of which people have answered, one of them with what a model may say and one with nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").symlink_to(model)
    tiny.write_rows(folder / "queries.jsonl", tiny.rows(QUERIES, responses=0))
    asked = [tiny.rows(QUERIES)[number]["query"] for number in (1, 7)]
    human = [{"query": asked[0], "responses": ["Of a person.", "Of a person.", "Another."], "scores": [1.0, None, 0.5]}]
    human.append({"id": "elsewhere", "query": asked[1], "responses": ["Another person's."]})
    tiny.write_rows(folder / "human.jsonl", human)
    return folder


def command(server: bad.Misbehaving, *more: str) -> list[str]:
    sources = ("model@diverse-beam:4", "model@top-p:2", f"{server.url}#m@chat:1", "human.jsonl")
    named = [part for source in sources for part in ("--source", source)]
    return ["sample", "--data", "queries.jsonl", "--output", "out.jsonl", *named, *SIZES, *more]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "calls")


GIVEN = ["human.jsonl", "model", "queries.jsonl"]


@pytest.fixture(scope="module")
def undisturbed(server: bad.Misbehaving, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """The file of a mixture that nothing disturbed, and its summary."""
    folder = workplace(tmp_path_factory.mktemp("undisturbed"), model)
    ended = warm(*command(server), cwd=folder).done()
    assert files(folder) == sorted([*GIVEN, "out.jsonl"])
    return (folder / "out.jsonl").read_bytes(), summary(ended.err)


def summary(said: str) -> str:
    return next(line for line in said.splitlines() if "merged" in line)


# --- a mixture -------------------------------------------------------------------------------------------------------


def test_a_mixture_of_models_a_server_and_people(
    undisturbed: tuple[bytes, str], server: bad.Misbehaving, model: Path
) -> None:
    rows = [json.loads(line) for line in undisturbed[0].splitlines()]
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(QUERIES)]
    merged = 0
    for i, row in enumerate(rows):
        assert len(row["responses"]) == len(set(row["responses"])) == len(row["sources"])
        assert all(text.strip() for text in row["responses"])
        tags = [tag for joined in row["sources"] for tag in joined.split("|")]
        merged += len(tags) - len(row["sources"])
        wanted = [f"model@diverse-beam/{n}" for n in range(4)] + [f"model@top-p/{n}" for n in range(2)]
        wanted += [f"{server.url.removeprefix('http://').replace('/', '-')}#m@chat/0"]
        wanted += [f"human/{n}" for n in range({1: 3, 7: 1}.get(i, 0))]
        assert set(tags) <= set(wanted) and len(set(tags)) == len(tags)
        assert wanted[6] in tags and set(wanted[7:]) <= set(tags)
    assert "human/0|human/1" in rows[1]["sources"]
    assert rows[1]["scores"][rows[1]["responses"].index("Of a person.")] == 1.0
    assert f"{merged} equal responses merged" in undisturbed[1]
    assert "2 queries joined with responses of human.jsonl" in undisturbed[1]


def test_empty_responses_are_dropped_and_the_key_is_nowhere(
    undisturbed: tuple[bytes, str], model: Path, tmp_path: Path
) -> None:
    """Stopped in the middle, so that what lies beside the output is looked through too."""
    folder = workplace(tmp_path, model)
    key = {"MY_KEY": KEY}
    with bad.misbehaving() as failing:
        failing.default = bad.text(" \n")
        failing.plan = [bad.well, bad.well, bad.echo_key(500), bad.echo_key(400)]
        flags = command(failing, "--api_key_env", "MY_KEY", "--concurrency", "1")
        stopped = warm(*flags, cwd=folder, env=key)
        assert stopped.code == 2 and "[the key]" in stopped.err
        assert any(path.name.startswith("journal-") for path in (folder / "out.jsonl.parts").iterdir())
        texts = [path.read_text() for path in folder.rglob("*") if path.is_file() and model not in path.parents]
        ended = warm(*flags, cwd=folder, env=key).done()
        assert all(header["authorization"] == f"Bearer {KEY}" for header in failing.headers)
    texts += [stopped.out, stopped.err, ended.out, ended.err, (folder / "out.jsonl").read_text()]
    assert not any(KEY in text for text in texts)
    of_models = int((re.findall(r"(\d+) empty", undisturbed[1]) or ["0"])[0])
    assert f"{of_models + QUERIES - 1} empty responses dropped" in ended.err


# --- several processes -----------------------------------------------------------------------------------------------


def torchrun(processes: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*launcher, "-m", "rrhf.cli", *arguments],
        cwd=cwd,
        env=tiny.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_torchrun_gives_the_file_of_one_process(
    undisturbed: tuple[bytes, str], server: bad.Misbehaving, model: Path, tmp_path: Path
) -> None:
    for processes in (1, 2):
        folder = workplace(tmp_path / str(processes), model)
        ended = torchrun(processes, *command(server), cwd=folder)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert (folder / "out.jsonl").read_bytes() == undisturbed[0]
        assert files(folder) == sorted([*GIVEN, "out.jsonl"])
        assert summary(ended.stderr) == undisturbed[1]  # of all parts, whoever did them


def test_processes_share_the_work_and_what_a_server_may_cost(
    undisturbed: tuple[bytes, str], server: bad.Misbehaving, model: Path, tmp_path: Path
) -> None:
    """Three, with what another run left unfinished under --overwrite; one of them is killed in its first batch."""
    folder = workplace(tmp_path, model)
    (folder / "out.jsonl").write_text("mine\n")
    other = [*command(server, "--overwrite"), "--temperature", "0.5"]
    assert warm(*other, cwd=folder, faults=[die(DECODE, 3)]).code == -signal.SIGKILL
    flags = command(server, "--overwrite", "--max_requests", "45")
    forks = tiny.forks(*tiny.PRELOADED)
    started = [
        forks.start(
            "rrhf.cli.main:main",
            flags,
            cwd=folder,
            faults=[die(DECODE, 1)] * (rank == 2),
            env={"RANK": str(rank), "WORLD_SIZE": "3"},
        )
        for rank in range(3)
    ]
    ended = [forks.wait(one) for one in started]
    assert [one.code for one in ended[:2]] == [0, 0], ended
    assert ended[2].code in (-signal.SIGKILL, 0)  # 0 where the others had taken everything
    assert (folder / "out.jsonl").read_bytes() == undisturbed[0]
    assert files(folder) == sorted([*GIVEN, "out.jsonl"])


# --- killed ----------------------------------------------------------------------------------------------------------

DECODE = "rrhf.sampling.decoding:decode"
MOMENTS = {  # what a process is about to do when it is killed → how many times it has come to that
    "os:fsync": 5,
    "os:replace": 3,
    "rrhf.records.parts_folder:append_line": 2,
    "rrhf.records.parts_folder:record_line": 2,
    DECODE: 3,
    "rrhf.common.journal:append_line": 3,
    "shutil:rmtree": 2,
}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_mixture_killed_again_and_again(
    overwrite: bool, undisturbed: tuple[bytes, str], server: bad.Misbehaving, model: Path, tmp_path: Path
) -> None:
    """Killed at each of these moments in turn, every attempt going on from the one before, it ends as if undisturbed.

    With --overwrite what stood there stays until the new file is whole, and finished parts are not done again.
    """
    folder, calls = workplace(tmp_path, model), tmp_path / "calls"
    output, flags = folder / "out.jsonl", command(server, *["--overwrite"] * overwrite)
    if overwrite:
        output.write_text("mine\n")
    killed = 0
    for moment, number in [*MOMENTS.items()] * (3 if tiny.LONG else 1):
        ended = warm(*flags, cwd=folder, faults=[tiny.count(DECODE, calls), die(moment, number)])
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.err
        killed += 1
        if output.exists() and output.read_text() != "mine\n":
            break
        assert output.exists() == overwrite
    assert killed >= 5
    if not output.exists() or output.read_text() == "mine\n":
        ended = warm(*flags, cwd=folder, faults=[tiny.count(DECODE, calls)]).done()
        assert summary(ended.err) == undisturbed[1]
    assert output.read_bytes() == undisturbed[0]
    decoded = len(calls.read_text().split())
    assert decoded <= 2 * QUERIES + 4 * killed  # a kill costs no more than the part it met
    if files(folder) != sorted([*GIVEN, "out.jsonl"]):
        warm(*command(server), cwd=folder)
    assert files(folder) == sorted([*GIVEN, "out.jsonl"])


@pytest.mark.skipif(not tiny.LONG, reason="hundreds of runs: RRHF_LONG=1")
@pytest.mark.parametrize(
    "moment", [*MOMENTS, "rrhf.common.files:fsync_folder", "rrhf.records.parts_folder:checksum_of_file"]
)
def test_a_mixture_killed_at_every_call(
    moment: str, undisturbed: tuple[bytes, str], server: bad.Misbehaving, model: Path, tmp_path: Path
) -> None:
    for number in random.Random(moment).sample(range(1, 80), 20):
        folder = workplace(tmp_path / str(number), model)
        ended = warm(*command(server), cwd=folder, faults=[die(moment, number)])
        if ended.code == 0:
            continue
        if not (folder / "out.jsonl").exists() or (folder / "out.jsonl.parts").exists():
            warm(*command(server), cwd=folder).done()
        assert (folder / "out.jsonl").read_bytes() == undisturbed[0]
        shutil.rmtree(folder)


# --- faults before any long work -------------------------------------------------------------------------------------


def refused(arguments: list[str], cwd: Path, **options: Any) -> str:
    """The one message of a command that stops before it loads a model or makes a file."""
    calls = cwd / "calls"
    before = files(cwd)
    ended = warm(*arguments, cwd=cwd, faults=[tiny.count("rrhf.models.cache:load_policy_or_adapter", calls)], **options)
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err and ended.err.count("rrhf sample:") == 1
    assert not calls.exists() and files(cwd) == before
    return ended.err


def single(*flags: str) -> list[str]:
    model = [] if "--source" in flags else ["--model", "model"]
    return ["sample", "--data", "queries.jsonl", "--output", "out.jsonl", *model, *SIZES, *flags]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num_responses", "0"], "--num_responses 0: must be at least 1"),
        (["--policy", "top-k", "--top_k", "0"], "--top_k 0: must be at least 1"),
        (["--top_p", "0"], "--top_p 0.0: must lie in (0, 1]"),
        (["--top_p", "1.5"], "--top_p 1.5: must lie in (0, 1]"),
        (["--policy", "diverse-beam", "--num_beams", "4", "--num_beam_groups", "3"], "4 is not divisible by"),
        (["--max_new_tokens", "100000"], "more than the context of 128"),
        (["--max_query_length", "125"], "more than the context of 128"),
        (["--output", "out.txt"], "unknown suffix '.txt'"),
        (["--output", "queries.jsonl/out.jsonl"], "cannot be made"),
        (["--source", "model@greedy:2"], "--source model@greedy:2: --num_responses 2: greedy has one response"),
        (["--source", "model@top-p:0"], "how many responses?"),
        (["--source", "vllm:model@diverse-beam:2"], "vLLM has no diverse beam search"),
        (["--source", "https://user:sk-secret@host/v1@chta:1"], "did you mean 'chat'"),
        (["--source", "https://host/v1?api_key=sk-secret@chat:1"], "keys come from the environment only"),
        (["--system_prompt", "Be brief."], "--system_prompt needs queries that are lists of messages"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], says: str, model: Path, tmp_path: Path) -> None:
    message = refused(single(*flags), workplace(tmp_path, model))
    assert says in message and "sk-secret" not in message


@pytest.mark.parametrize("alone", [True, False])
def test_servers_that_do_not_answer_or_refuse(alone: bool, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    folder = workplace(tmp_path, model)
    before = [] if alone else ["--source", "model@top-p:2"]
    down = f"http://127.0.0.1:{closed_port()}/v1"
    assert down in refused(single(*before, "--source", f"{down}#m@chat:1"), folder)
    with bad.misbehaving() as server:
        server.default = bad.echo_key(401)
        message = refused(single(*before, "--source", f"{server.url}#m@chat:1"), folder, env={"OPENAI_API_KEY": KEY})
        assert "HTTP 401" in message and "OPENAI_API_KEY" in message and KEY not in message
        message = refused(single("--source", f"{server.url}#m@chat:1", "--max_requests", "2"), folder, env=THREE)
        assert "--max_requests 2 is less than one for each of 3 processes" in message


THREE = {"RANK": "0", "WORLD_SIZE": "3"}
LATE = [{"id": f"q{i}", "query": f"short {i}"} for i in range(40)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"id": "last", "query": "long " * 200}, "record last: a query of"),
        ({"id": "last", "query": [{"role": "user", "content": "hello"}]}, "no chat template"),
        ({"id": "last", "query": 3}, "queries.jsonl"),
        ({"id": "q3", "query": "again"}, "q3"),
    ],
)
def test_a_query_that_does_not_fit_deep_in_the_data(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    plain = tiny.write_model(tmp_path / "plain", chat=False)
    folder = workplace(tmp_path / "work", plain)
    tiny.write_rows(folder / "queries.jsonl", [*LATE, row])
    assert says in refused(single(), folder)


def test_messages_for_a_completions_server_and_no_query_at_all(
    server: bad.Misbehaving, model: Path, tmp_path: Path
) -> None:
    folder = workplace(tmp_path, model)
    tiny.write_rows(folder / "queries.jsonl", [*LATE, {"id": "x", "query": [{"role": "user", "content": "hello"}]}])
    message = refused(single("--source", "model@greedy:1", "--source", f"{server.url}#m@completions:1"), folder)
    assert "record x" in message and "use the kind chat" in message
    (folder / "queries.jsonl").write_text("")
    assert "no record" in refused(single(), folder)


# --- memory ----------------------------------------------------------------------------------------------------------


MANY = """
import json, sys
from pathlib import Path
from rrhf.cli.main import main
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.decoding import Response

def draw(self, queries, keys, ends):
    # A stub of a policy: everything else is the command's own way.
    return [[Response([60 + i] * 12 + query[:4], "length") for i in range(4)] for query in queries]

def run(number):
    with open(f"{number}.jsonl", "w") as file:
        for i in range(number):
            file.write(json.dumps({"query": f"the query number {i}", "topic": "some words that travel along"}) + "\\n")
    sizes = ["--max_new_tokens", "16", "--device", "cpu", "--dtype", "float32", "--batch_size", "64"]
    assert main(["sample", "--model", sys.argv[1], "--data", f"{number}.jsonl", "--output", f"out-{number}.jsonl", *sizes]) == 0

def peak():
    # VmHWM begins with this program; ru_maxrss would begin with what the test process held when it started this one.
    status = Path("/proc/self/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))

Sampler.draw = draw
run(int(sys.argv[2]))
few = peak()
run(int(sys.argv[3]))
print(few, peak())
"""  # noqa: E501


def test_memory_does_not_grow_with_the_queries(model: Path, tmp_path: Path) -> None:
    """A million queries under 1 GiB in the long form; kept records would take 2 kB a query and fail the short one."""
    number = 1_000_000 if tiny.LONG else 12_000
    found = subprocess.run(
        [sys.executable, "-c", MANY, str(model), "2000", str(number)],
        cwd=tmp_path,
        env=tiny.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    few, many = (int(kilobytes) / 1024 for kilobytes in found.stdout.split()[-2:])
    print(f"peak {few:.0f} MiB with 2000 queries, {many:.0f} MiB with {number}")
    assert many < 1024
    assert many - few < (200 if tiny.LONG else 12)
    with (tmp_path / f"out-{number}.jsonl").open(encoding="utf-8") as file:
        assert sum(len(json.loads(line)["responses"]) for line in file) == 4 * number
