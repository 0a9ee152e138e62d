"""Ports on loopback that no other test takes, in whatever process it runs."""

from __future__ import annotations

import os
import random
import socket

HANDED_OUT_FROM = 32768  # systems give ports from here on to whoever asks for any
_held: list[socket.socket] = []


def closed_port() -> int:
    """A port where nobody listens, and where nobody else can: this process holds it until it ends."""
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    _held.append(held)
    return int(held.getsockname()[1])


def free_port() -> int:
    """A port for a server that a test is about to start, below those that are handed out: nobody gets it by chance."""
    draw = random.Random(os.getpid())
    while True:
        port = draw.randrange(HANDED_OUT_FROM // 2, HANDED_OUT_FROM)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
