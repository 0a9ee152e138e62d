"""Faults, put into a stage at moments drawn from a seed; each says what was injected and what was lost."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.stages import STAGES, World, judged
from support import misbehaving as bad
from support import tiny
from support.tiny import Result, at_moment

MOST_KILLS, FEW_KILLS = 4, 2  # of one folder, one after the other; where the moments are not counted
COMPLETE = ("exists already", "holds a finished model")  # what a finished command is told when it is given again
GONE_ON = "same command"


@dataclass(frozen=True)
class Outcome:
    """What was done to a stage, and what is not as it would have been: nothing, if all is well."""

    stage: str
    seed: int
    injected: str
    lost: tuple[str, ...]
    kills: int = 0

    def line(self) -> str:
        return f"{self.stage}: seed {self.seed}: {self.injected}; lost: {'; '.join(self.lost) or 'zero'}"


class Case:
    """One folder of a stage in which a fault happens.

    Args:
        moments: how many lines of the package the command runs: moments at which something can happen. Where there are
            fewer, the command ends before it does.
    """

    def __init__(self, world: World, stage: str, seed: int, fault: str, moments: int | None = None) -> None:
        self.world, self.stage, self.seed = world, stage, seed
        self.draw = random.Random(f"{fault} {stage} {seed}")
        self.moments = moments or world.moments(stage)
        self.most_kills = FEW_KILLS if moments else MOST_KILLS
        self.folder = world.folder(f"{stage}-{fault}-{seed}", stage)
        self.output = self.folder / STAGES[stage].output
        self.wrong: list[str] = []
        self.kills = 0

    def moment(self) -> int:
        """Early ones and late ones alike: half of them on a logarithmic scale."""
        power = self.draw.uniform(0.5, 1.0)
        return int(self.moments**power) if self.draw.random() < 0.5 else self.draw.randrange(1, self.moments)

    def run(self, *faults: dict[str, object]) -> Result:
        ended = self.world.run(self.stage, self.folder, *faults)
        self.kills += ended.code == -signal.SIGKILL
        return ended

    def expect(self, ended: Result, codes: tuple[int, ...], *words: str) -> None:
        """Note what is wrong with how a command ended."""
        if ended.code not in codes or "Traceback" in ended.err:
            self.wrong.append(f"exit code {ended.code}, {codes} expected: {ended.err[-1500:]}")
        if ended.code != 0 and not any(word in ended.err for word in (*words, *COMPLETE) if words):
            self.wrong += [f"not said: {' or '.join(words)}: {ended.err[-1500:]}"] if words else []

    def end(self, injected: str) -> Outcome:
        """Give the command again, undisturbed, and compare."""
        ended = self.run()
        if ended.code != 0 and not any(sign in ended.err for sign in COMPLETE):
            self.wrong.append(f"the same command again: exit code {ended.code}: {ended.err[-1500:]}")
        else:
            self.wrong += self.world.lost(self.stage, self.folder)
        shutil.rmtree(self.folder)
        return Outcome(self.stage, self.seed, injected, tuple(self.wrong), self.kills)


def killed(case: Case) -> Outcome:
    """SIGKILL, again and again."""
    at = []
    for _ in range(case.most_kills):
        at.append(case.moment())
        ended = case.run(at_moment(at[-1]))
        if ended.code != -signal.SIGKILL:
            case.expect(ended, (0, 2), *COMPLETE)
            at[-1] = 0  # after the end
            break
    return case.end(f"SIGKILL at moments {at}")


def signalled(case: Case) -> Outcome:
    """Ctrl-C or SIGTERM: a clean stop whose exit code says which."""
    how, moment = case.draw.choice(["INT", "TERM"]), case.moment()
    ended = case.run(at_moment(moment, how=how))
    case.expect(ended, ({"INT": 130, "TERM": 143}[how], 0), GONE_ON)
    return case.end(f"SIG{how} at moment {moment}, exit code {ended.code}")


def disk_full(case: Case) -> Outcome:
    """No file grows past a limit from some moment on."""
    moment, limit = case.moment(), case.draw.choice([0, 300, 3000])
    ended = case.run(at_moment(moment, limit=limit))
    case.expect(ended, (0, 2), "free some space")
    return case.end(f"files limited to {limit} bytes from moment {moment} on, exit code {ended.code}")


def removed(case: Case) -> Outcome:
    """The output's folder, or that of its parts, is removed while the command runs."""
    moment = case.moment()
    parts = case.output.with_name(f"{case.output.name}.parts")
    ended = case.run(at_moment(moment, remove=str(parts if case.output.suffix else case.output)))
    case.expect(ended, (0, 2), GONE_ON)
    return case.end(f"the output's folder removed at moment {moment}, exit code {ended.code}")


def damaged(case: Case) -> Outcome:
    """What a killed command left of parts, checkpoints and their lists is truncated, changed or emptied."""
    moment = case.moment()
    ended = case.run(at_moment(moment))
    case.expect(ended, (0, 2, -signal.SIGKILL))
    done = []
    if ended.code:
        found = sorted(path for path in case.folder.rglob("*") if _is_unfinished_work(path))
        for path in case.draw.sample(found, min(2, len(found))):
            done.append(f"{path.name} {_damage(path, case.draw)}")
    return case.end(f"SIGKILL at moment {moment}, then {', '.join(done) or 'there was nothing to damage'}")


def _is_unfinished_work(path: Path) -> bool:
    within = any(part.endswith(".parts") or part.startswith("checkpoint-") for part in path.parts[:-1])
    return within and path.is_file() and path.stat().st_size > 0 and not path.name.startswith((".", "lock", "settings"))


def _damage(path: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    how = draw.choice(["truncated", "changed", "emptied"])
    place = draw.randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    path.write_bytes({"truncated": content[:place], "changed": flipped, "emptied": b""}[how])
    return how


def clock(case: Case) -> Outcome:
    """The clock jumps, and what stands on the disk is of another time."""
    moment, seconds = case.moment(), case.draw.choice([-1, 1]) * case.draw.choice([3600, 10**7])
    ended = case.run(at_moment(moment, clock=seconds))
    case.expect(ended, (0,))
    another = case.world.folder(f"{case.folder.name}-again", case.stage)
    shutil.rmtree(case.folder)
    case.folder = another
    case.run(at_moment(moment))
    for path in case.folder.rglob("*"):
        os.utime(path, (when := time.time() + seconds, when))
    return case.end(f"the clock jumped by {seconds} s at moment {moment}; after SIGKILL there all files are as old")


def second(case: Case) -> Outcome:
    """A second command in the same folder while the first is at work."""
    moment = case.moments // 4
    for name in ("entered", "met"):
        os.mkfifo(case.folder / name)
    command = case.world.command(case.stage)
    faults = [at_moment(moment, hold=str(case.folder))]
    entered = os.open(case.folder / "entered", os.O_RDONLY | os.O_NONBLOCK)
    met = os.open(case.folder / "met", os.O_RDWR)  # which waits for nobody
    first = tiny.forks(*tiny.PRELOADED).start("rrhf.cli.main:main", command, cwd=case.folder, faults=faults)
    here = select.poll()
    here.register(entered, select.POLLIN)
    if not here.poll(1000 * tiny.HANGS_AFTER):
        case.wrong.append(f"the first process never came to moment {moment}")
    ended = case.run()
    os.write(met, b"x")
    other = tiny.forks(*tiny.PRELOADED).wait(first)
    came_first = ended.code == 0  # the other had not begun in the folder yet
    refused = other if came_first else ended
    case.expect(ended if came_first else other, (0,))
    case.expect(refused, (2,))
    if not came_first and f"process {first[0]} on {os.uname().nodename}" not in ended.err:
        case.wrong.append(f"the second is not told who the first is: {ended.err[-1500:]}")
    for file in (entered, met):
        os.close(file)
    for name in ("entered", "met"):
        (case.folder / name).unlink()
    return case.end(f"another process at moment {moment}, refused: {refused.err.strip().splitlines()[-1][:160]}")


def poisoned(case: Case) -> Outcome:
    """A gradient that is not a number: nothing is updated."""
    at = STAGES[case.stage].poisoned
    assert at is not None
    call = case.draw.randint(1, 4)
    ended = case.run(tiny.poison(at, call))
    case.expect(ended, (2,), "gradient's norm is nan")
    return case.end(f"a gradient of NaN in step {call}")


MISBEHAVIOURS: dict[str, bad.Behaviour] = {
    "reset": bad.cut,
    "429": bad.status(429, headers={"Retry-After": "0"}),
    "500": bad.status(500),
    "truncated JSON": bad.raw('{"choices": [{"message"'),
    "no JSON": bad.raw("<html>busy</html>"),
    "no choices": bad.raw('{"choices": []}'),
    "wrong content": bad.text(7),
}


def chaos(case: Case) -> Outcome:
    """A server that misbehaves now and then, and a kill in between."""
    server = case.world.server
    names = [case.draw.choice([*MISBEHAVIOURS, "well", "well"]) for _ in range(12)]
    server.plan = [MISBEHAVIOURS.get(name, judged if case.stage == "judge" else bad.well) for name in names]
    case.run(at_moment(case.moment()))
    case.run()
    injected = f"the server: {', '.join(names[: 12 - len(server.plan)])}"
    server.plan = []
    return case.end(injected)


FAULTS: dict[str, Callable[[Case], Outcome]] = {
    "kill": killed, "signal": signalled, "disk full": disk_full, "removed": removed, "damaged": damaged,
    "clock": clock, "second run": second, "NaN": poisoned, "chaos": chaos,
}  # fmt: skip


def applies(fault: str, stage: str) -> bool:
    """Whether a fault can happen to a stage."""
    if fault == "NaN":
        return STAGES[stage].poisoned is not None
    if fault == "chaos":
        return stage in ("judge", "source")
    if fault == "damaged":
        return stage not in ("report", "judge")
    # Several processes share a reproduction; reports and judgements are written at the end, whole.
    return fault != "second run" or stage not in ("report", "judge", "reproduce")


def inject(world: World, stage: str, fault: str, seed: int, moments: int | None = None) -> Outcome:
    """Let a fault happen to a stage."""
    return FAULTS[fault](Case(world, stage, seed, fault.replace(" ", "-"), moments))
