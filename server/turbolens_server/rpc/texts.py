"""Texts that wait for the model's text encoder: searches. They share passes, and passes take turns with pictures."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Awaitable, Callable
from typing import Final

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
_KEPT: Final = 256
"""Texts whose vectors are kept: people search for the same words."""
_SHARE: Final = 0.2
"""Of a batch's time that a pass beside it may take."""
_MOST: Final = 16
"""Texts of one pass."""


class Texts:
    """Belongs to one event loop."""

    def __init__(self, most: int) -> None:
        """`most` may wait."""
        self._most = most
        self._waiting: dict[str, list[asyncio.Future[Vector]]] = {}
        self._known: collections.OrderedDict[str, Vector] = collections.OrderedDict()
        self._text_s = 0.0
        self._batch_s = 0.0
        self._had_last_turn = False
        self._task: asyncio.Task[None] | None = None

    @property
    def full(self) -> bool:
        """Whether no more may wait."""
        return sum(len(waiters) for waiters in self._waiting.values()) >= self._most

    def add(self, text: str) -> asyncio.Future[Vector]:
        """A text that waits; one that is known does not."""
        waiter: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()
        if text in self._known:
            self._known.move_to_end(text)
            waiter.set_result(self._known[text])
        else:
            self._waiting.setdefault(text, []).append(waiter)
        return waiter

    def are_next(self, *, batch_waits: bool) -> bool:
        """Whether the engine's next turn is theirs; no two in a row while a batch waits."""
        for text in [text for text, waiters in self._waiting.items() if all(w.cancelled() for w in waiters)]:
            del self._waiting[text]
        if self._waiting and not (batch_waits and self._had_last_turn):
            return True
        self._had_last_turn = False
        return False

    def batch_took(self, seconds: float) -> None:
        """A batch has run."""
        self._batch_s = seconds

    def start(self, embed: Callable[[list[str]], Awaitable[Vector]], done: Callable[[], None]) -> None:
        """Run a pass of those that came first, and call `done` after it."""
        self._had_last_turn = True
        fit = round(_SHARE * self._batch_s / self._text_s) if self._text_s else 1
        texts = list(self._waiting)[: min(max(fit, 1), _MOST)]
        waiters = {text: self._waiting.pop(text) for text in texts}
        self._task = asyncio.get_running_loop().create_task(self._run(waiters, embed, done))

    async def _run(
        self,
        waiters: dict[str, list[asyncio.Future[Vector]]],
        embed: Callable[[list[str]], Awaitable[Vector]],
        done: Callable[[], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            vectors = await embed(list(waiters))
        except Exception as error:
            for waiter in [waiter for each in waiters.values() for waiter in each if not waiter.done()]:
                waiter.set_exception(error)
        else:
            self._text_s = (loop.time() - started) / len(waiters)
            for (text, each), vector in zip(waiters.items(), vectors, strict=True):
                self._known[text] = vector
                for waiter in [waiter for waiter in each if not waiter.done()]:
                    waiter.set_result(vector)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        finally:
            done()

    def drop(self) -> None:
        """Leave those that wait."""
        for waiter in [waiter for each in self._waiting.values() for waiter in each]:
            waiter.cancel()
        self._waiting.clear()
