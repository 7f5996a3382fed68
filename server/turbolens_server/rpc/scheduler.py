"""A bounded queue in front of the one thread that runs the engine."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Event, FeaturesReady, Job, Result, StepDone
from turbolens_server.rpc.errors import overloaded

T = TypeVar("T")

MAX_BATCH: Final = 8
"""Jobs of one call of the engine."""
_RETRY_AFTER_S: Final = 1.0


@dataclasses.dataclass(frozen=True)
class Queued:
    """A request waits behind `position` others; told again as they go."""

    position: int


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request's place in the queue, what happened to it, and its way to say that nobody waits for it any more."""

    events: asyncio.Queue[Queued | Event | None] = dataclasses.field(default_factory=asyncio.Queue)
    """Grows to the events of the request at most; None is the end."""
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    position: int = -1

    def move(self, position: int) -> None:
        """Say where it stands, where that is new."""
        if position != self.position:
            self.position = position
            self.events.put_nowait(Queued(position))


class Scheduler:
    """Runs requests one after another, first come first served. Its methods belong to one event loop."""

    def __init__(self, engine: Engine, max_queue: int) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._waiting: collections.OrderedDict[int, Ticket] = collections.OrderedDict()
        self._calls = 0
        self._turn = asyncio.Lock()  # asyncio wakes those who wait for a lock in order

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run something short on the engine's thread, ahead of the queue and counted apart from it.

        Raises:
            RpcError: RESOURCE_EXHAUSTED where as many wait as the queue may hold.
        """
        if self._calls >= self._max_queue:
            raise overloaded(self._calls, _RETRY_AFTER_S)
        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, self._engine)
        finally:
            self._calls -= 1

    async def stream(self, jobs: Sequence[Job]) -> AsyncGenerator[Queued | Event, None]:
        """Run jobs, yielding what happens as it happens; ends after the last job's result.

        Closing the iterator, or cancelling its task, takes the request out of the queue at once, and out of the
        engine at its next step.

        Raises:
            RpcError: RESOURCE_EXHAUSTED where the queue is full.
        """
        if len(self._waiting) >= self._max_queue:
            raise overloaded(len(self._waiting), _RETRY_AFTER_S)
        ticket = Ticket()
        self._waiting[id(ticket)] = ticket
        ticket.move(len(self._waiting) - 1 + self._turn.locked())
        # The turn belongs to a task of its own: a caller who reads slowly must not hold up those behind.
        turn = asyncio.create_task(self._take_turn(ticket, jobs))
        try:
            while (event := await ticket.events.get()) is not None:
                yield event
            await turn
        finally:
            ticket.cancelled.set()
            if self._leave_queue(ticket):
                turn.cancel()
            await asyncio.shield(asyncio.gather(turn, return_exceptions=True))

    async def _take_turn(self, ticket: Ticket, jobs: Sequence[Job]) -> None:
        """Wait for the engine and run; ends only when the engine has, so that the turn is passed on only then."""
        loop = asyncio.get_running_loop()

        def forward(event: Event | None) -> None:
            loop.call_soon_threadsafe(ticket.events.put_nowait, event)

        async with self._turn:
            self._leave_queue(ticket)
            await loop.run_in_executor(self._thread, self._run, jobs, forward, ticket.cancelled)

    def _leave_queue(self, ticket: Ticket) -> bool:
        """Take a request out of the queue and tell those behind; False where it had left before."""
        if self._waiting.pop(id(ticket), None) is None:
            return False
        for index, other in enumerate(self._waiting.values()):
            other.move(index + self._turn.locked())
        return True

    async def run(self, jobs: Sequence[Job]) -> list[Result]:
        """Run jobs to their end; results in order of the jobs."""
        results = [event async for event in self.stream(jobs) if isinstance(event, Result)]
        return sorted(results, key=lambda result: result.job)

    def _run(self, jobs: Sequence[Job], forward: Callable[[Event | None], None], cancelled: threading.Event) -> None:
        """In the engine's thread: batches of at most MAX_BATCH jobs, with positions counted over all of them."""
        try:
            for start in range(0, len(jobs), MAX_BATCH):
                if cancelled.is_set():
                    return

                def shifted(event: Event, start: int = start) -> None:
                    forward(_shift(event, start))

                self._engine.run(
                    jobs[start : start + MAX_BATCH], on_event=shifted, cancelled=lambda _: cancelled.is_set()
                )
        finally:
            forward(None)

    def close(self) -> None:
        """Let the thread end after what it is doing."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _shift(event: Event, start: int) -> Event:
    if not start:
        return event
    moved: dict[str, Any] = {"job": event.job + start}
    match event:
        case StepDone() | FeaturesReady() | Result():
            return dataclasses.replace(event, **moved)
