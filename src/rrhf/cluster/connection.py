"""To a Ray cluster and back: the connection, and what there is room for.

Ray runs whatever code it is sent by whoever reaches its ports: docs/cluster.md says how to keep others out.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rrhf.cluster.settings import ClusterSettings
from rrhf.common.errors import UserError

log = logging.getLogger("rrhf")

ANSWERS_WITHIN = 10.0  # seconds in which a cluster takes a connection


@dataclass(frozen=True)
class Share:
    """What each process on the cluster gets, and how many there are."""

    workers: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPUs each" if self.gpus else ""
        return f"{self.workers} process(es), {self.cpus:g} CPUs each{gpus}"


@contextmanager
def connected(settings: ClusterSettings) -> Iterator[None]:
    """Connect with the cluster that ``settings`` name, unless this process is connected with one already.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("--cluster needs Ray: pip install 'rrhf[ray]', or leave --cluster out")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read where Ray starts: nothing is reported to anybody
    import ray

    if ray.is_initialized():
        yield
        return
    address = str(settings.cluster)
    if address not in ("auto", "local"):
        _knock(address)
    dashboard = False if address == "local" else None  # of a cluster that runs it is not ours to say
    with _own_signals() as take_back:
        try:
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING, include_dashboard=dashboard)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"--cluster {address}: {_first_line(error)}: {CURE}") from error
        take_back()
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[Callable[[], None]]:
    """Let SIGINT and SIGTERM do what they do in a command without a cluster; yields what takes them back from Ray.

    Ray puts in handlers of its own, and makes another exit, or a failure, of what ours raise while it waits.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    got: list[int] = []

    def stop(number: int, frame: Any) -> None:
        got.append(number)
        if callable(handler := before[signal.Signals(number)]):
            handler(number, frame)

    def put_in() -> None:
        if threading.current_thread() is threading.main_thread():  # signals come to it alone
            for number, handler in before.items():
                signal.signal(number, stop if callable(handler) else handler)

    put_in()
    try:
        yield put_in
    except GeneratorExit:  # whoever asked for work has stopped, and says why
        raise
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:  # Ray's handler, while it starts
            stop(signal.SIGTERM, None)
        if got:
            raise (KeyboardInterrupt() if got[0] == signal.SIGINT else SystemExit(128 + got[0])) from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


CURE = (
    "start Ray with `ray start --head` on one machine and `ray start --address=HOST:PORT` on the others, with the same "
    "versions of Ray and Python, and run this command on one of them; --cluster local needs nothing"
)


def _knock(address: str) -> None:
    """Refuse an address where nothing listens, for which Ray would wait long."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWERS_WITHIN).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--cluster {address}: nobody answers there ({error}): {CURE}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")


def share(settings: ClusterSettings, device: str) -> Share:
    """What the processes of a stage get of the cluster that this process is connected with.

    Args:
        device: ``--device``; ``cpu`` takes no GPU.

    Raises:
        UserError: there is no room for so many processes, or for a single one.
    """
    nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
    some = any(node.get("GPU", 0) > 0 for node in nodes)
    gpus = settings.cluster_gpus if settings.cluster_gpus is not None else float(some and device != "cpu")
    room = sum(_room(node, settings.cluster_cpus, gpus) for node in nodes)
    if not room:
        most = max((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
        raise UserError(
            f"no node of the cluster has {settings.cluster_cpus:g} CPUs and {gpus:g} GPUs (the largest has {most[0]:g} "
            f"and {most[1]:g}): give a smaller --cluster_cpus or --cluster_gpus, or add nodes"
        )
    if settings.cluster_workers is not None and settings.cluster_workers > room:
        raise UserError(
            f"--cluster_workers {settings.cluster_workers}: the cluster has room for {room} of "
            f"{settings.cluster_cpus:g} CPUs and {gpus:g} GPUs: give fewer, smaller ones (--cluster_cpus, "
            "--cluster_gpus), or add nodes"
        )
    return Share(settings.cluster_workers or room, settings.cluster_cpus, gpus)


def _room(node: dict[str, float], cpus: float, gpus: float) -> int:
    by_cpus = math.floor(node.get("CPU", 0) / cpus + 1e-9)
    return min(by_cpus, math.floor(node.get("GPU", 0) / gpus + 1e-9)) if gpus else by_cpus


def this_node() -> str:
    """The id of the node that this process is on."""
    return str(_ray().get_runtime_context().get_node_id())


def _ray() -> Any:
    import ray

    return ray
