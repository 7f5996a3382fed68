"""Threads for what is done to a request before it may wait in the queue: reading it, and finding what is wrong with it.

Few, because they compete with the engine for the interpreter; counted, because a check costs more than a refusal.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from turbolens_server.rpc.errors import overloaded

T = TypeVar("T")
_THREADS: Final = 2
_MOST: Final = 64
"""Requests that are checked or wait to be."""


class CheckPool:
    """A pool of its own, so that checks wait for checks alone. Belongs to one event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="check")
        self._places = threading.BoundedSemaphore(_MOST)

    async def run(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """The function's result; a caller who leaves takes a check that has not begun along.

        Raises:
            RpcError: RESOURCE_EXHAUSTED where too many wait.
        """
        if not self._places.acquire(blocking=False):
            raise overloaded(f"{_MOST} requests are being checked", 1.0, "CHECKS_FULL")
        future = self._pool.submit(function, *arguments, **options)
        # By the check's end and not its caller's: one that has begun goes on, and still takes a thread.
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the threads once what they do is done."""
        self._pool.shutdown(wait=False, cancel_futures=True)
