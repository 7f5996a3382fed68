"""Repeated requests: a caller that lost an answer on the way asks again under the same request id, and gets it.

A repetition joins the first call while that runs, and gets its answer for a while after. Nothing else is shared:
another caller, another method or another request under the same id is another call.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
from google.protobuf.message import Message

_WINDOW_S: Final = 120.0
"""How long an answer is kept after it was made."""
_KEPT_BYTES: Final = 64 * 2**20
"""Of all answers that are kept; the oldest go first."""
Key = tuple[str, str, str, bytes]


@dataclasses.dataclass
class _Answer:
    task: asyncio.Task[Message]
    waiters: int = 0
    size: int = 0
    until: float = float("inf")
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the log says of it: its task's own, until it ends."""


class Answers:
    """Those that are made and those that are kept. Belongs to one event loop."""

    def __init__(self, on_repeated: Callable[[], None] = lambda: None) -> None:
        self._answers: collections.OrderedDict[Key, _Answer] = collections.OrderedDict()
        self._size = 0
        self._on_repeated = on_repeated

    @staticmethod
    def key(caller: str, method: str, request_id: str, message: bytes) -> Key:
        """What makes two calls the same."""
        return caller, method, request_id, hashlib.sha256(message).digest()

    async def once(self, key: Key, make: Callable[[], Awaitable[Message]]) -> Message:
        """The answer to a call, made by the first that asks.

        It is made for as long as anybody waits for it. An error is the first caller's own: who joined tries for itself.
        """
        self._forget()
        found = self._answers.get(key)
        if found is not None:
            self._on_repeated()
            try:
                return await self._wait(key, found)
            except asyncio.CancelledError:
                if not found.task.cancelled():
                    raise  # this caller has left, too
            except Exception:  # noqa: S110  # the first caller's own, who is told
                pass
            return await make()

        async def making() -> Any:
            try:
                return await make()
            finally:
                answer.notes = structlog.contextvars.get_contextvars()

        answer = self._answers[key] = _Answer(asyncio.create_task(making()))
        return await self._wait(key, answer)

    async def _wait(self, key: Key, answer: _Answer) -> Message:
        answer.waiters += 1
        try:
            made = await asyncio.shield(answer.task)
        except BaseException:
            if answer.waiters == 1:
                answer.task.cancel()
                if self._answers.get(key) is answer:
                    del self._answers[key]
            raise
        finally:
            answer.waiters -= 1
            own = structlog.contextvars.get_contextvars()
            structlog.contextvars.bind_contextvars(**{k: v for k, v in answer.notes.items() if k not in own})
        if not answer.size and self._answers.get(key) is answer:
            answer.size = max(made.ByteSize(), 1)
            answer.until = asyncio.get_running_loop().time() + _WINDOW_S
            self._answers.move_to_end(key)
            self._size += answer.size
        return made

    def _forget(self) -> None:
        """Let go of answers that are old, and of the oldest where there are too many."""
        now = asyncio.get_running_loop().time()
        for key in [key for key, answer in self._answers.items() if answer.until < now]:
            self._size -= self._answers.pop(key).size
        for key in [key for key, answer in self._answers.items() if answer.task.done()]:
            if self._size <= _KEPT_BYTES:
                break
            self._size -= self._answers.pop(key).size
