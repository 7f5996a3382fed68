"""The queue between the event loop and the engine's threads: callers in, batches out, events back to each caller.

What runs next is decided by :mod:`turbolens_server.engine.batcher`; here are only the loop, the threads and the limits.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import structlog

from turbolens_server.engine.batcher import Batcher, Slot
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Event, Job, NotFinite, Result
from turbolens_server.rpc.errors import expired, not_finite, overloaded

T = TypeVar("T")

_RETRY_AFTER_S: Final = (0.1, 1.0, 60.0)
"""Least, where nothing has been measured yet, and most."""


@dataclasses.dataclass(frozen=True)
class QueueLimits:
    """What runs together, and what may wait."""

    max_batch: int = 8
    """Pictures of a batch."""
    batch_wait_s: float = 0.005
    """How long after a shared batch a smaller one waits for its callers to come back."""
    max_queue: int = 64
    """Requests that wait."""
    max_queue_pictures: int = 256
    """Pictures that wait, of all requests."""


@dataclasses.dataclass(frozen=True)
class Queued:
    """A request waits behind `position` others; told again as they go."""

    position: int


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request from its arrival to its end."""

    unfinished: int
    """Jobs that wait or run."""
    arrived: float
    deadline: float | None
    """On the loop's clock, like `arrived`; None: none."""
    events: asyncio.Queue[Queued | Event | None] = dataclasses.field(default_factory=asyncio.Queue)
    """Grows to the events of the request at most; None is the end."""
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Nobody waits for it any more; read by the engine's threads."""
    position: int = -1
    started: float | None = None
    largest_batch: int = 0
    error: Exception | None = None

    def move(self, position: int) -> None:
        """Say where it stands, where that is new."""
        if position != self.position:
            self.position = position
            self.events.put_nowait(Queued(position))

    def end(self, error: Exception | None = None) -> None:
        """Say that nothing more comes."""
        self.error = error
        self.events.put_nowait(None)


class Queue:
    """Runs jobs of many requests in shared batches. Its methods belong to one event loop."""

    def __init__(
        self,
        engine: Engine,
        limits: QueueLimits,
        *,
        pipelined: bool | None = None,
        on_error: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        """Start the engine's threads.

        Args:
            engine: called in these threads only.
            limits: of batches and of the queue.
            pipelined: decode a batch in a thread of its own while the next is denoised; None: as the engine says.
            on_error: told on the loop of every error that the engine raises, before its callers are.
        """
        self.limits = limits
        self._engine = engine
        self._on_error = on_error
        self._batcher: Batcher[Ticket] = Batcher(limits.max_batch, limits.batch_wait_s)
        self._pipelined = engine.pipelined if pipelined is None else pipelined
        self._denoise = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._decode = ThreadPoolExecutor(1, thread_name_prefix="decode") if self._pipelined else self._denoise
        self._decoding = asyncio.Lock()
        self._tickets: dict[Ticket, None] = {}  # those not at their end, in order of arrival
        self._batches: dict[asyncio.Task[None], list[Slot[Ticket]]] = {}  # those that run
        self._denoising = False
        self._timer: asyncio.TimerHandle | None = None
        self._calls = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._batcher.waiting)

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run something short on the engine's thread, ahead of the queue and counted apart from it.

        Raises:
            RpcError: RESOURCE_EXHAUSTED where as many wait as the queue may hold.
        """
        if self._calls >= self.limits.max_queue:
            raise overloaded(f"{self._calls} searches wait", self._retry_after_s())
        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._denoise, function, self._engine)
        except Exception as error:
            self._on_error(error)
            raise
        finally:
            self._calls -= 1

    async def stream(self, jobs: Sequence[Job], deadline: float | None = None) -> AsyncGenerator[Queued | Event, None]:
        """Run jobs, yielding what happens as it happens; ends after the last job's result.

        Closing the iterator, or cancelling its task, takes the request out of the queue at once, and out of the
        engine at its next step.

        Args:
            jobs: of one request, in order.
            deadline: on the loop's clock; a request that still waits then is dropped before it costs anything.

        Raises:
            RpcError: RESOURCE_EXHAUSTED where the queue is full, DEADLINE_EXCEEDED where the deadline passed in it.
        """
        self._check_room(len(jobs))
        ticket = Ticket(len(jobs), asyncio.get_running_loop().time(), deadline)
        self._tickets[ticket] = None
        self._batcher.add(ticket, jobs)
        ticket.move(len(self._tickets) - 1)
        self._start_next()
        try:
            while (event := await ticket.events.get()) is not None:
                yield event
            if ticket.error is not None:
                raise ticket.error
        finally:
            ticket.cancelled.set()
            self._remove(ticket)
            self._tell_positions()
            started = ticket.started or asyncio.get_running_loop().time()
            structlog.contextvars.bind_contextvars(
                queue_ms=round((started - ticket.arrived) * 1000, 1), batch_size=ticket.largest_batch
            )

    async def run(self, jobs: Sequence[Job], deadline: float | None = None) -> list[Result]:
        """Run jobs to their end; results in order of the jobs. Arguments and errors as for `stream`.

        Raises:
            RpcError: INTERNAL where a job came to values that are not finite; the request's other jobs are left.
        """
        results = []
        async with contextlib.aclosing(self.stream(jobs, deadline)) as events:
            async for event in events:
                if isinstance(event, NotFinite):
                    raise not_finite(event, jobs[event.job].seed)
                if isinstance(event, Result):
                    results.append(event)
        return sorted(results, key=lambda result: result.job)

    async def close(self) -> None:
        """End what runs at its next step, and the threads."""
        for ticket in list(self._tickets):
            ticket.cancelled.set()
            self._batcher.drop(ticket)
        await asyncio.gather(*self._batches, return_exceptions=True)
        for thread in (self._denoise, self._decode):
            await asyncio.to_thread(thread.shutdown, wait=True, cancel_futures=True)

    # Admission

    def _check_room(self, jobs: int) -> None:
        requests, pictures = self.waiting, len(self._batcher)
        if requests >= self.limits.max_queue or pictures + jobs > self.limits.max_queue_pictures:
            raise overloaded(f"{requests} requests with {pictures} pictures wait", self._retry_after_s())

    def _retry_after_s(self) -> float:
        """When a request sent now would have had its turn: after all that waits and runs."""
        least, unknown, most = _RETRY_AFTER_S
        known = self._batcher.drain_s(slot for batch in self._batches.values() for slot in batch)
        return unknown if known is None else min(max(known, least), most)

    # Batches

    def _start_next(self) -> None:
        """Start the next batch where the engine is free and it is time."""
        if self._denoising:
            return
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        now = loop.time()
        for ticket in self._batcher.waiting:
            if ticket.deadline is not None and ticket.deadline <= now:
                self._end(ticket, expired())
        start_at = self._batcher.start_at()
        if start_at is None:
            return
        if start_at > now:
            self._timer = loop.call_at(start_at, self._start_next)
            return
        batch = self._batcher.take()
        self._denoising = True
        for slot in batch:
            slot.request.started = slot.request.started or now
            slot.request.largest_batch = max(slot.request.largest_batch, len(batch))
        self._tell_positions()
        task = loop.create_task(self._run(batch))
        self._batches[task] = batch
        task.add_done_callback(self._batches.pop)

    async def _run(self, batch: list[Slot[Ticket]]) -> None:
        """One batch through both stages.

        The engine is free again once the batch is decoded, or, pipelined, once its decoding begins: then one batch
        decodes while one denoises, and a third waits in the queue, where it can still grow.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()

        def forward(event: Event) -> None:
            slot = batch[event.job]
            loop.call_soon_threadsafe(slot.request.events.put_nowait, dataclasses.replace(event, job=slot.index))

        def cancelled(row: int) -> bool:
            return batch[row].request.cancelled.is_set()

        denoise = functools.partial(self._engine.denoise, on_event=forward, cancelled=cancelled)
        decode = functools.partial(self._engine.decode, on_event=forward, cancelled=cancelled)
        freed = False
        try:
            denoised = await loop.run_in_executor(self._denoise, denoise, [slot.job for slot in batch])
            async with self._decoding:
                if self._pipelined:
                    freed = True
                    self._free()
                await loop.run_in_executor(self._decode, decode, denoised)
        except Exception as error:
            self._on_error(error)
            for ticket in {slot.request for slot in batch}:
                self._end(ticket, error)
        else:
            self._batcher.ended(batch, started, loop.time())
            for ticket, jobs in collections.Counter(slot.request for slot in batch).items():
                ticket.unfinished -= jobs
                if not ticket.unfinished:
                    self._end(ticket)
        finally:
            if not freed:
                self._free()
            self._tell_positions()  # after the next batch has started: those in it stand nowhere any more

    def _free(self) -> None:
        self._denoising = False
        self._start_next()

    # Tickets

    def _end(self, ticket: Ticket, error: Exception | None = None) -> None:
        ticket.end(error)
        self._remove(ticket)

    def _remove(self, ticket: Ticket) -> None:
        """Take a request out of the queue; a second time does nothing."""
        if ticket in self._tickets:
            del self._tickets[ticket]
            self._batcher.drop(ticket)

    def _tell_positions(self) -> None:
        for position, ticket in enumerate(self._tickets):
            if ticket.started is None:
                ticket.move(position)
