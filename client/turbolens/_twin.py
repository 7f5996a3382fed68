"""The sync client's way to what only the async one does: a loop and a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from turbolens._async import AsyncLens

T = TypeVar("T")


def run_sync(work: Callable[[AsyncLens], Coroutine[Any, Any, T]], lens: Any) -> T:
    """What `work` comes to with an async client of the same server.

    In a thread, since notebooks run a loop already; an interrupt ends it at its next step, with all it has written.
    """
    result: list[T] = []
    errors: list[BaseException] = []
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = []

    async def connected() -> T:
        started.append((asyncio.get_running_loop(), asyncio.current_task()))
        twin = AsyncLens(lens._to, timeout=lens._timeout, attempts=lens._attempts, embedded=lens._embedded)
        try:
            return await work(twin)
        finally:
            if twin._services is not None:  # and not the embedded server, which is the other client's
                await twin._services.channel.close()

    def loop() -> None:
        try:
            result.append(asyncio.run(connected()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=loop, name="turbolens-many", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        for running, task in started:
            running.call_soon_threadsafe(task.cancel if task else running.stop)
        thread.join()
        raise
    if errors:
        raise errors[0]
    return result[0]
