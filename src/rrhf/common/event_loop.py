"""An event loop in a thread of its own, for callers that are not asynchronous, or have a loop running already."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def event_loop(name: str) -> Iterator[Callable[..., Any]]:
    """Yield a function that runs a coroutine in the loop, and waits for it unless told ``wait=False``.

    However the block ends, by Ctrl-C too, everything in the loop is cancelled and the thread ``name`` is gone.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=name, daemon=True)
    thread.start()

    def run(work: Any, wait: bool = True) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, loop)
        return future.result() if wait else future

    try:
        yield run
    finally:
        run(_cancel_all())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
