"""What a client waits for: a stream's messages, whose reader may take its time, and the loop that it belongs to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc


async def async_messages(messages: Any, seconds: float | None) -> AsyncIterator[Any]:
    """The messages of a call, which is cancelled where all the waits for them come to more than so many seconds.

    The time that their reader takes in between does not count: a deadline of gRPC's own would, and tell who looks at
    each picture for a while that the server is slow.

    Raises:
        TimeoutError: they did not come in time.
    """
    left, coming = seconds, aiter(messages)
    while True:
        began = time.monotonic()
        async with asyncio.timeout(left):
            message = await anext(coming, None)
        if message is None:
            return
        left = _less(left, began)
        yield message


def sync_messages(messages: Any, seconds: float | None) -> Iterator[Any]:
    """The same of a call of the sync client, where only a cancellation ends a wait."""
    left = seconds
    while True:
        began = time.monotonic()
        with _Alarm(left, messages.cancel) as alarm:
            try:
                message = next(messages, None)
            except grpc.RpcError:
                if alarm.rang:
                    raise TimeoutError from None
                raise
        if message is None:
            return
        left = _less(left, began)
        yield message


class _Alarm:
    """Calls in so many seconds, unless it is left before; never where that is None."""

    def __init__(self, seconds: float | None, call: Callable[[], object]) -> None:
        self.rang = False
        self._call = call
        self._timer = None if seconds is None else threading.Timer(seconds, self._ring)

    def _ring(self) -> None:
        self.rang = True
        self._call()

    def __enter__(self) -> _Alarm:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _less(left: float | None, began: float) -> float | None:
    return None if left is None else max(left - (time.monotonic() - began), 0.001)


def async_home() -> Callable[[], bool]:
    """Whether who asks runs in the loop that this was called in: a channel cannot leave it."""
    loop = asyncio.get_running_loop()
    return lambda: asyncio.get_running_loop() is loop


def sync_home() -> Callable[[], bool]:
    """The sync client is at home in every thread."""
    return lambda: True
