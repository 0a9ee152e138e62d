"""Ctrl-C and SIGTERM to commands that work on a cluster: exit code, nothing left behind, and the same command again.

What works on the cluster sends the signal itself, and waits for ever: the command is then waiting for it within Ray.
"""

from __future__ import annotations

import contextlib
import os
import select
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import tiny
from support.nodes import PATIENT, Nodes, started

PATIENCE = 120  # seconds for a process to end, on a busy machine

# Imported by the command first, which checks it, and then by a process of the cluster, where the work is.
STOPS = """
import os, signal, threading
from pathlib import Path
import tiny_rewards

if not Path("command").exists():
    Path("command").write_text(str(os.getpid()))

def stop(call, at=CALL):
    command = int(Path("command").read_text())
    if call < at or os.getpid() == command or Path("worker").exists():
        return
    Path("worker").write_text(str(os.getpid()))
    if SIGNAL == signal.SIGINT:
        os.killpg(command, SIGNAL)  # as a terminal does
    else:
        os.kill(command, SIGNAL)
    threading.Event().wait()

calls = 0

def vowels(prompts, completions, **columns):
    global calls
    calls += 1
    stop(calls)
    return tiny_rewards.vowels(prompts, completions)

def hinge(*arguments, **options):
    global calls
    calls += 1
    from rrhf.losses import ranking_loss
    stop(calls)
    return ranking_loss("hinge")(*arguments, **options)
"""


def left_of(mark: str) -> Iterator[int]:
    """The processes that a command has started, by a mark in their environment."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (place / "environ").read_bytes():
                yield int(place.name)


def ends(pid: int) -> bool:
    """Wait until a process has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        return bool(waiting.poll(1000 * PATIENCE))
    finally:
        os.close(handle)


MODEL = ["--model", "model", "--device", "cpu", "--dtype", "float32"]
STEPS = ["--per_device_train_batch_size=4", "--max_length=64", "--bf16=false", "--report_to=none", "--save_steps=1"]
SHORT = ["--policy=top-p", "--num_responses=2", "--max_new_tokens=4", "--batch_size=1"]
COMMANDS = {
    "score": (["score", "--data", "data.jsonl", "--reward", "stops:vowels", "--output", "out.jsonl"], 1),
    "train": (["train", *MODEL, "--data", "data.jsonl", *STEPS, "--ranking_loss=stops:hinge", "--output", "out"], 9),
    "sample": (["sample", *MODEL, "--data", "data.jsonl", *SHORT, "--output", "out.jsonl"], 0),
    "run": (["run", "config.yaml", "--output", "out"], 4),
}
CASES = [("score", "TERM", "nodes"), ("train", "INT", "local")]
LONG = [(name, how, where) for name in COMMANDS for how in ("INT", "TERM") for where in ("local", "nodes")]
WHERE = [pytest.param(*case, id="-".join(case)) for case in CASES] + [
    pytest.param(
        *case, id="-".join(case), marks=pytest.mark.skipif(not tiny.LONG, reason="Ray is started: RRHF_LONG=1")
    )
    for case in LONG
    if case not in CASES
]


@pytest.mark.parametrize(("name", "how", "where"), WHERE)
def test_a_signal_stops_a_command_on_a_cluster(
    name: str, how: str, where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("ray")
    command, call = COMMANDS[name]
    place = workplace(tmp_path, name, how, call)
    nodes: Nodes | None = request.getfixturevalue("nodes") if where == "nodes" else None
    if nodes is not None:
        nodes.have(2)
    mark = uuid.uuid4().hex
    cluster = ["--cluster", nodes.cluster.address if nodes else "local", "--cluster_workers", "1"]
    env, command_itself = {**PATIENT, "RRHF_TEST_MARK": mark}, tiny.die("rrhf.cluster.ladder:Ladder.took", 1, how)
    faults = [] if call else [command_itself]  # a model calls nothing of ours

    def run() -> tiny.Result:
        ended = tiny.cold(*command, *cluster, cwd=place, env=env, faults=faults, start_new_session=True)
        if "timed out during startup" in ended.err:
            raise RuntimeError(ended.err)
        return ended

    stopped = started(run)
    assert stopped.code == {"INT": 130, "TERM": 143}[how], stopped.err[-3000:]
    assert "the same command goes on from there" in stopped.err, stopped.err[-3000:]
    assert not [line for line in stopped.err.splitlines() if line.startswith("Traceback")]  # Ray's own bear a name
    assert not call or ends(int((place / "worker").read_text()))
    assert all(ends(pid) for pid in left_of(mark))
    tiny.warm(*command, cwd=place).done()
    assert (place / command[-1]).exists()


def workplace(place: Path, name: str, how: str, call: int) -> Path:
    config = tiny.config(tiny.write_model(place / "model"))
    config["score"]["reward"] = config["evaluate"]["reward"] = ["tiny_rewards:vowels"]
    config["train"] |= {"ranking_loss": "stops:hinge", "num_train_epochs": 1}
    tiny.workplace(place, config)
    (place / "stops.py").write_text(
        STOPS.replace("CALL", str(call)).replace("SIGNAL", f"signal.SIG{how}"), encoding="utf-8"
    )
    return place
