"""A server that is killed while many vote has every vote that it answered, once."""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
from collections import Counter
from pathlib import Path
from urllib.parse import urlencode

import pytest

from rrhf.arena.store import open_study, votes
from support.arena import create, plain_systems, serving

RATERS, KILLS, BETWEEN = 8, 2, 40


class Voter(threading.Thread):
    """Votes as fast as the server answers, until the server is gone or all is done."""

    def __init__(self, port: int, path: str, kept: dict[str, str], answered: threading.Semaphore) -> None:
        super().__init__()
        self.port, self.path, self.kept, self.answered = port, path, kept, answered

    def run(self) -> None:
        try:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the server is gone
                self._vote()
        finally:
            self.answered.release(BETWEEN)  # nobody is to wait for more of this one's votes

    def _vote(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

        def ask(
            method: str, path: str, body: str | None = None, cookie: str = ""
        ) -> tuple[http.client.HTTPResponse, str]:
            connection.request(method, path, body, {"Cookie": cookie})
            answer = connection.getresponse()
            return answer, answer.read().decode()

        cookie = str(ask("GET", self.path)[0].getheader("set-cookie")).partition(";")[0]
        _, page = ask("GET", "/rate", cookie=cookie)
        while "Thank you" not in page:
            form = {name: re.findall(rf'name="{name}" value="([^"]*)"', page)[0] for name in ("mark", "task", "seen")}
            choice = ("left", "tie", "right")[len(self.kept) % 3]
            place = re.findall('action="(/rate/[0-9]+)"', page)[0]
            answer, _ = ask("POST", place, urlencode({**form, "choice": choice}), cookie)
            assert answer.status == 303
            self.kept[form["task"]] = choice
            self.answered.release()
            _, page = ask("GET", "/rate", cookie=cookie)


def test_a_killed_server_has_every_vote_that_it_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = str(tmp_path / "study.db")
    flags = plain_systems(tmp_path, "ab", 25)
    names = [f"rater-{number}" for number in range(1, RATERS + 1)]
    links = create([study, *flags, "--raters", *names, "--common", "25", "--checks", "0"], capsys)
    kept: dict[str, dict[str, str]] = {name: {} for name in names}
    with serving(study, "--requests_per_minute", "100000") as server:
        for killed in range(KILLS + 1):
            answered = threading.Semaphore(0)
            port = int(server.url.rpartition(":")[2])
            voters = [Voter(port, links[name], kept[name], answered) for name in names]
            for voter in voters:
                voter.start()
            if killed < KILLS:
                for _ in range(BETWEEN):
                    answered.acquire()
                server.kill()
            for voter in voters:
                voter.join()
            if killed < KILLS:
                server.start_again()
    with open_study(study) as opened:
        stored = Counter((vote.rater, vote.pair) for vote in votes(opened))
        choices = {(vote.rater, vote.pair): vote.choice for vote in votes(opened)}
    assert len(stored) == RATERS * 25 and set(stored.values()) == {1}
    said = {(name, task): choice for name in names for task, choice in kept[name].items()}
    assert len(said) >= KILLS * BETWEEN and {key: choices[key] for key in said} == said
