"""The arena under load: 50 raters, each a vote a second until 130, against `rrhf arena serve` on 2 cores.

Raters are threads of this process, each with a connection of its own; they share the two cores with the server. Each
vote is a form sent from the page that was read before, and then the next page is read. Votes answer within 50 ms in the
median and 300 ms in the 99th percentile, and none is lost or counted twice, or the script ends with code 1.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlencode

from common import machine, report, table
from rrhf.arena.settings import StudySettings
from rrhf.arena.store import create_study, open_study, votes
from rrhf.arena.systems import Systems

MEDIAN, P99 = 50.0, 300.0  # milliseconds
CHOICES = ("left", "tie", "right", "skip")


class Rater(threading.Thread):
    """Votes once a second; keeps what the server has acknowledged, and how long it took."""

    def __init__(self, place: tuple[str, int], token: str, count: int, pause: float, start: float) -> None:
        super().__init__()
        self.place, self.token, self.count, self.pause, self.begin = place, token, count, pause, start
        self.sent: dict[str, str] = {}
        self.votes: list[float] = []
        self.pages: list[float] = []
        self.faults: list[str] = []

    def run(self) -> None:
        try:
            self._rate()
        except Exception as error:
            self.faults.append(repr(error))

    def _rate(self) -> None:
        rng = random.Random(self.token)
        connection = http.client.HTTPConnection(*self.place, timeout=60)
        connection.request("GET", f"/r/{self.token}")
        entered = connection.getresponse()
        entered.read()
        headers = {"Cookie": str(entered.getheader("set-cookie")).partition(";")[0]}

        def ask(method: str, path: str, body: str | None = None) -> tuple[int, str, float]:
            more = {"Content-Type": "application/x-www-form-urlencoded"} if body else {}
            begin = time.perf_counter()
            connection.request(method, path, body, {**headers, **more})
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, text, 1000 * (time.perf_counter() - begin)

        due = self.begin + rng.random() * self.pause
        _, page, _ = ask("GET", "/rate")
        for _ in range(self.count):
            time.sleep(max(0.0, due - time.monotonic()))
            due += self.pause
            form = {name: re.search(rf'name="{name}" value="([^"]*)"', page)[1] for name in ("mark", "task", "seen")}  # type: ignore[index]
            action = re.search('action="(/rate/[0-9]+)"', page)[1]  # type: ignore[index]
            choice = rng.choice(CHOICES)
            status, _, took = ask("POST", action, urlencode({**form, "choice": choice, "why": ""}))
            if status != 303:
                self.faults.append(f"{action}: {status}")
                return
            self.sent[form["task"]] = choice
            self.votes.append(took)
            status, page, took = ask("GET", "/rate")
            self.pages.append(took)
        connection.close()


def study_in(place: str, raters: int, count: int) -> dict[str, str]:
    """A study with enough pairs for ``count`` a rater, of responses as long as people write them."""
    rng = random.Random(0)
    words = [a + b for a in ("in", "re", "con", "de", "un") for b in ("form", "port", "tain", "vise", "cover")]

    def text() -> str:
        return ". ".join(" ".join(rng.choices(words, k=12)) for _ in range(rng.randint(2, 12))) + "."

    queries = {f"q{number}": text() for number in range(330)}
    texts = {name: {query: text() for query in queries} for name in "abcd"}
    asked = [("a", "b"), ("a", "c"), ("a", "d")]
    names = [f"rater-{number}" for number in range(raters)]
    settings = StudySettings(checks=0, per_rater=count, common=min(30, count))
    return create_study(place, Systems(dict(queries), texts), asked, names, settings, "http://127.0.0.1:8000")


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def vote(place: str, tokens: dict[str, str], count: int, pause: float) -> tuple[list[Rater], float]:
    """Serve the study in ``place`` and let its raters vote; return them and the server's processor seconds."""
    command = [sys.executable, "-m", "rrhf.cli", "arena", "serve", place, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(re.findall(r":(\d+): serving", server.stdout.readline())[0])
        start = time.monotonic() + 2
        raters = [Rater(("127.0.0.1", port), t, count, pause, start) for name, t in tokens.items() if name != "owner"]
        for rater in raters:
            rater.start()
        for rater in raters:
            rater.join()
        fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
        return raters, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    finally:
        server.terminate()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raters", type=int, default=50)
    parser.add_argument("--votes", type=int, default=130, help="a rater")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between a rater's votes")
    parser.add_argument("--study", help="an empty PostgreSQL database's URL (default: a file)")
    parser.add_argument("--output", help="write the table as Markdown too")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as folder:
        place = options.study or str(Path(folder) / "study.db")
        tokens = study_in(place, options.raters, options.votes)
        before = os.getloadavg()[0]
        raters, used = vote(place, tokens, options.votes, options.pause)
        with open_study(place) as study:
            kept = Counter((one.rater, one.pair, one.choice) for one in votes(study))
    names = [name for name in tokens if name != "owner"]
    sent = {(name, task, choice) for name, rater in zip(names, raters) for task, choice in rater.sent.items()}
    took, pages = ([one for rater in raters for one in getattr(rater, kind)] for kind in ("votes", "pages"))
    lost, twice = len(sent - set(kept)), sum(kept.values()) - len(sent)
    rows = [
        [what, str(len(values)), *(f"{percentile(values, share):.1f}" for share in (0.5, 0.99)), f"{max(values):.0f}"]
        for what, values in (("a vote", took), ("the next page", pages))
    ]
    load = f"load {before:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
    kind = "SQLite" if options.study is None else "PostgreSQL"
    text = "\n".join(
        [
            f"{machine()}; {len(os.sched_getaffinity(0))} cores; {load}; {kind}",
            table(["answer", "count", "median ms", "99th percentile ms", "longest ms"], rows),
            f"{options.raters} raters; {lost} votes lost, {twice} counted twice; server: {used:.0f} s of processor",
        ]
    )
    report(text, options.output)
    faults = [fault for rater in raters for fault in rater.faults]
    if faults:
        print(json.dumps(faults[:10]), file=sys.stderr)
    sound = len(sent) == options.raters * options.votes and not (lost or twice or faults)
    return 0 if sound and percentile(took, 0.5) <= MEDIAN and percentile(took, 0.99) <= P99 else 1


if __name__ == "__main__":
    raise SystemExit(main())
