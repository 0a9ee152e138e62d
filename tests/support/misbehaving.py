"""An OpenAI-compatible server on loopback that does, one request after another, what a test tells it to.

Each POST takes the next behaviour from ``plan``; where none is left, the server behaves.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = 10  # tokens the server says a request has cost


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Misbehaving

    def do_GET(self) -> None:
        self.server.gets += 1
        self.send_json({"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        behave = self.server.arrived(self, body)
        try:
            behave(self, body)
        except OSError:  # the client is gone
            self.close_connection = True
        finally:
            self.server.left()

    def send_json(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_text(json.dumps(answer), status, headers)

    def send_text(self, text: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


Behaviour = Callable[[Handler, dict[str, Any]], None]


class Misbehaving(ThreadingHTTPServer):
    """``posts`` are the bodies of all requests, ``headers`` their headers, ``peak`` the most at the same time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[Behaviour] = []
        self.default: Behaviour = well
        self.models = ["m"]
        self.posts: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.gets = self.now = self.peak = 0
        self.most_choices = 100
        self.change = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def arrived(self, handler: Handler, body: dict[str, Any]) -> Behaviour:
        with self.change:
            self.posts.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.now += 1
            self.peak = max(self.peak, self.now)
            self.change.notify_all()
            return self.plan.pop(0) if self.plan else self.default

    def left(self) -> None:
        with self.change:
            self.now -= 1
            self.change.notify_all()

    def wait_for_posts(self, number: int) -> bool:
        with self.change:
            return self.change.wait_for(lambda: len(self.posts) >= number, timeout=240)

    def wait_until_idle(self) -> bool:
        """Whether all requests end: answered, or left by their client."""
        with self.change:
            return self.change.wait_for(lambda: self.now == 0, timeout=240)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that go away in the middle are what it is for


@contextlib.contextmanager
def misbehaving() -> Iterator[Misbehaving]:
    with Misbehaving() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


# --- behaviours


def said(body: dict[str, Any], number: int = 0) -> str:
    """What the server answers to a request when it behaves."""
    asked = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    return f"{asked}, {body['seed']}, {number}"


def answer(body: dict[str, Any], texts: list[Any], finish: str | None = "stop", usage: int = USAGE) -> dict[str, Any]:
    shape = (lambda text: {"text": text}) if "prompt" in body else (lambda text: {"message": {"content": text}})
    choices = [{"index": i, "finish_reason": finish, **shape(text)} for i, text in enumerate(texts)]
    return {"object": "x", "choices": choices, "usage": {"total_tokens": usage}}


def well(handler: Handler, body: dict[str, Any]) -> None:
    number = min(body.get("n", 1), handler.server.most_choices)
    handler.send_json(answer(body, [said(body, i) for i in range(number)]))


def text(content: Any, finish: str | None = "stop", usage: int = USAGE) -> Behaviour:
    return lambda handler, body: handler.send_json(answer(body, [content] * body.get("n", 1), finish, usage))


def raw(content: str) -> Behaviour:
    return lambda handler, body: handler.send_text(content)


def status(code: int, message: str = "no", headers: dict[str, str] | None = None, kind: str | None = None) -> Behaviour:
    error = {"error": {"message": message, "code": kind}}
    return lambda handler, body: handler.send_json(error, code, headers)


def echo_key(code: int) -> Behaviour:
    """Refuse, and repeat the key that was sent."""
    return lambda handler, body: handler.send_json(
        {"error": {"message": f"Incorrect API key provided: {handler.headers['Authorization']}"}}, code
    )


def hang(handler: Handler, body: dict[str, Any]) -> None:
    """Say nothing until the client is gone."""
    handler.connection.recv(1)
    handler.close_connection = True


def stall(handler: Handler, body: dict[str, Any]) -> None:
    """Begin an answer and then say nothing until the client is gone."""
    _half(handler)
    hang(handler, body)


def cut(handler: Handler, body: dict[str, Any]) -> None:
    """Break the connection in the middle of the answer."""
    _half(handler)
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def _half(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"te')
    handler.wfile.flush()


def after(event: threading.Event, then: Behaviour) -> Behaviour:
    """Behave like ``then`` once ``event`` is set."""

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        event.wait(30)
        then(handler, body)

    return behave


def together(number: int) -> Behaviour:
    """Behave well when ``number`` requests are there at the same time; fail where that never happens."""
    barrier = threading.Barrier(number)

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        try:
            barrier.wait(30)
        except threading.BrokenBarrierError:
            handler.send_json({"error": {"message": "too few requests at the same time"}}, 400)
            return
        well(handler, body)

    return behave
