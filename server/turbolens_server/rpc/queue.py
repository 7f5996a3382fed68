"""The queue between the event loop and the engine's threads: callers in, batches out, events back to each caller.

What runs next is decided by :mod:`turbolens_server.engine.batcher`; here are only the loop, the threads and the limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import structlog

from turbolens_server.engine.batcher import Batcher
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Event, Job, NotFinite, Result
from turbolens_server.rpc import traces
from turbolens_server.rpc.admission import SHARE
from turbolens_server.rpc.errors import (
    expired,
    not_finite,
    out_of_memory,
    overloaded,
    says_out_of_memory,
    stopping,
)
from turbolens_server.rpc.metrics import Metrics
from turbolens_server.rpc.texts import Texts
from turbolens_server.rpc.tickets import Batch, Queued, Ticket

T = TypeVar("T")

_RETRY_AFTER_S: Final = (0.1, 1.0, 60.0)
"""Least, where nothing has been measured yet, and most."""
_STOP_MARGIN: Final = 1.25
"""What a request must take at most of the time that is left, by estimate, to be finished before a stop."""


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
    max_queue_s: float = 24.0
    """Seconds of work that wait, by estimate: no more than a stop leaves time to finish. What comes when nothing waits
    is let in however long it takes."""


class Queue:
    """Runs jobs of many requests in shared batches. Its methods belong to one event loop."""

    def __init__(
        self,
        engine: Engine,
        limits: QueueLimits,
        *,
        pipelined: bool | None = None,
        on_error: Callable[[Exception], None] = lambda _: None,
        metrics: Metrics | None = None,
    ) -> None:
        """Start the engine's threads.

        Args:
            engine: called in these threads only.
            limits: of batches and of the queue.
            pipelined: decode a batch in a thread of its own while the next is denoised; None: as the engine says.
            on_error: told on the loop of every error that the engine raises, before its callers are.
            metrics: where to count; None: nowhere that anybody reads.
        """
        self.limits = limits
        self.metrics = metrics or Metrics()
        self._engine = engine
        self._on_error = on_error
        self._batcher: Batcher[Ticket] = Batcher(limits.max_batch, limits.batch_wait_s)
        self._pipelined = engine.pipelined if pipelined is None else pipelined
        self._denoise = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._decode = ThreadPoolExecutor(1, thread_name_prefix="decode") if self._pipelined else self._denoise
        self._decoding = asyncio.Lock()
        self._tickets: dict[Ticket, None] = {}  # those not at their end, in order of arrival
        self._unread: set[Ticket] = set()  # those whose callers still read
        self._batches: dict[asyncio.Task[None], Batch] = {}  # those that run
        self._texts = Texts(limits.max_queue)
        self._busy = False
        """The engine's first thread has something to do."""
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._batcher.waiting)

    @property
    def waiting_pictures(self) -> int:
        """Pictures in the queue."""
        return len(self._batcher)

    @property
    def running_pictures(self) -> int:
        """Pictures in the engine."""
        return sum(len(batch.slots) for batch in self._batches.values())

    @property
    def undelivered_bytes(self) -> int:
        """What the engine has made and callers have not taken."""
        return sum(ticket.undelivered_bytes for ticket in self._unread)

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run something on the engine's thread, between two batches.

        What raises there is told to `on_error` too.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._denoise, function, self._engine)
        except Exception as error:
            self._on_error(error)
            raise

    async def warm_up(self) -> None:
        """Run what will be served once. It tells about how long jobs take, so that no more is let in than a stop can
        finish even before a batch has ended."""
        self._batcher.expect(*await self.call(lambda engine: engine.warm_up(self.limits.max_batch)))

    async def embed(self, text: str) -> npt.NDArray[np.float32]:
        """A text as the model's text encoder sees it. Texts that wait share a pass, and passes take turns with batches.

        Raises:
            RpcError: RESOURCE_EXHAUSTED where as many wait as requests may.
        """
        if self._texts.full:
            raise overloaded(f"{self.limits.max_queue} searches wait", self._retry_after_s())
        waiter = self._texts.add(text)
        self._start_next()
        return await waiter

    async def stream(
        self, jobs: Sequence[Job], deadline: float | None = None, caller: str = "", engine: Engine | None = None
    ) -> AsyncGenerator[Queued | Event, None]:
        """Run jobs, yielding what happens as it happens; ends after the last job's result.

        Closing the iterator, or cancelling its task, takes the request out of the queue at once, and out of the
        engine at its next step.

        Args:
            jobs: of one request, in order.
            deadline: on the loop's clock; a request that still waits then is dropped before it costs anything.
            caller: who asks; callers share the engine.
            engine: that the jobs were checked for, of the same model; None: the queue's own.

        Raises:
            RpcError: RESOURCE_EXHAUSTED where the queue is full, DEADLINE_EXCEEDED where the deadline passed in it,
                UNAVAILABLE where the server stops.
        """
        self._check_room(jobs, caller)
        loop = asyncio.get_running_loop()
        ticket = Ticket(len(jobs), loop.time(), deadline, caller, engine or self._engine)
        self._tickets[ticket] = None
        self._unread.add(ticket)
        self._batcher.add(ticket, jobs, caller, ticket.engine)
        ticket.move(len(self._tickets) - 1)
        self._start_next()
        try:
            while (event := await ticket.next()) is not None:
                yield event
            if ticket.error is not None:
                raise ticket.error
        finally:
            self._leave(ticket)
            started = ticket.started or loop.time()
            structlog.contextvars.bind_contextvars(
                queue_ms=round((started - ticket.arrived) * 1000, 1), batch_size=ticket.largest_batch
            )

    async def run(
        self, jobs: Sequence[Job], deadline: float | None = None, caller: str = "", engine: Engine | None = None
    ) -> list[Result]:
        """Run jobs to their end; results in order of the jobs. Arguments and errors as for `stream`.

        Raises:
            RpcError: INTERNAL where a job came to values that are not finite; the request's other jobs are left.
        """
        results = []
        async with contextlib.aclosing(self.stream(jobs, deadline, caller, engine)) as events:
            async for event in events:
                if isinstance(event, NotFinite):
                    raise not_finite(event, jobs[event.job].seed)
                if isinstance(event, Result):
                    results.append(event)
        return sorted(results, key=lambda result: result.job)

    def stop_within(self, seconds: float) -> int:
        """Take nothing new, finish by order of arrival what can be finished in time, and refuse the rest at once.

        Returns:
            How many requests were refused.
        """
        self._stopping = self._batcher.first_come = True
        running = [slot.job for batch in self._batches.values() for slot in batch.slots]
        ahead, refused = self._batcher.takes_s(running), 0
        if ahead is None:
            return 0
        for ticket in list(self._tickets):
            takes = self._batcher.takes_s(self._batcher.jobs_of(ticket)) or 0.0
            if takes and (ahead + takes) * _STOP_MARGIN > seconds:
                self._end(ticket, stopping())
                refused += 1
            else:
                ahead += takes
        return refused

    def give_up(self) -> int:
        """End every request that is left, and tell its caller to go elsewhere; returns how many there were."""
        left = list(self._tickets)
        for ticket in left:
            ticket.cancelled.set()
            self._end(ticket, stopping())
        return len(left)

    async def close(self) -> None:
        """End what runs at its next step, and the threads."""
        self.give_up()
        self._texts.drop()
        await asyncio.gather(*self._batches, return_exceptions=True)
        for thread in (self._denoise, self._decode):
            await asyncio.to_thread(thread.shutdown, wait=True, cancel_futures=True)

    # Admission

    def _check_room(self, jobs: Sequence[Job], caller: str) -> None:
        if self._stopping:
            raise stopping()
        limits, requests, pictures = self.limits, self.waiting, len(self._batcher)
        if requests >= limits.max_queue or pictures + len(jobs) > limits.max_queue_pictures:
            raise overloaded(f"{requests} requests with {pictures} pictures wait", self._retry_after_s())
        own = [ticket for ticket in self._batcher.waiting if ticket.caller == caller]
        own_pictures = sum(len(self._batcher.jobs_of(ticket)) for ticket in own)
        if len(own) > SHARE * (limits.max_queue - requests) or own_pictures > SHARE * (
            limits.max_queue_pictures - pictures
        ):
            raise overloaded(
                f"{len(own)} requests of this caller wait, and others want room", self._retry_after_s(), "SHARE_FULL"
            )
        ahead = self._drain_s()
        takes = self._batcher.takes_s(jobs)
        if requests and ahead is not None and takes is not None and ahead + takes > limits.max_queue_s:
            raise overloaded(f"{ahead:.0f} s of work wait", self._retry_after_s())

    def _drain_s(self) -> float | None:
        return self._batcher.drain_s(slot for batch in self._batches.values() for slot in batch.slots)

    def _retry_after_s(self) -> float:
        """When a request sent now would have had its turn: after all that waits and runs."""
        least, unknown, most = _RETRY_AFTER_S
        known = self._drain_s()
        return unknown if known is None else min(max(known, least), most)

    # Batches

    def _start_next(self) -> None:
        """Start the next batch, or pass of the text encoder, where the engine is free and it is time."""
        if self._busy:
            return
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        now = loop.time()
        for ticket in self._batcher.waiting:
            if ticket.deadline is not None and ticket.deadline <= now:
                self._end(ticket, expired())
        start_at = self._batcher.start_at()
        if self._texts.are_next(batch_waits=start_at is not None):
            self._busy = True
            self._texts.start(self._embed, self._free)
            return
        if start_at is None:
            return
        if start_at > now:
            self._timer = loop.call_at(start_at, self._start_next)
            return
        batch = Batch(self._batcher.take())
        self._busy = True
        for ticket in batch.tickets:
            if ticket.started is None:
                ticket.started = now
                self.metrics.queue_wait.observe(now - ticket.arrived)
                traces.record(ticket.context, "queue", ticket.arrived, now)
            ticket.largest_batch = max(ticket.largest_batch, len(batch.slots))
        self.metrics.batch_size.observe(len(batch.slots))
        self._tell_positions()
        task = loop.create_task(self._run(batch))
        self._batches[task] = batch
        task.add_done_callback(self._batches.pop)

    async def _embed(self, texts: list[str]) -> npt.NDArray[np.float32]:
        started = asyncio.get_running_loop().time()
        embedded = await self.call(lambda engine: engine.embed_text(texts))
        self.metrics.stage_seconds.labels("text").observe(asyncio.get_running_loop().time() - started)
        return embedded

    async def _run(self, batch: Batch) -> None:
        """One batch to its end.

        The engine is free again once the batch is decoded, or, pipelined, once its decoding begins: then one batch
        decodes while one denoises, and a third waits in the queue, where it can still grow.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        freed = False

        def free() -> None:
            nonlocal freed
            if not freed:
                freed = True
                self._free()

        try:
            await self._through_both_stages(batch, free)
        except Exception as error:
            self._on_error(error)
            for ticket in batch.tickets & self._tickets.keys():
                self._end(ticket, error)
        else:
            self._batcher.ended(batch.slots, started, loop.time(), whole=not batch.served_nobody)
            self._texts.batch_took(loop.time() - started)
        finally:
            batch.count_steps(self.metrics)
            free()
            self._tell_positions()  # after the next batch has started: those in it stand nowhere any more

    async def _through_both_stages(self, batch: Batch, free: Callable[[], None]) -> None:
        """Run a batch; where memory does not suffice, its halves, once."""
        try:
            await self._stages(batch, free if self._pipelined else None)
            return
        except Exception as error:
            if not says_out_of_memory(error) or len(batch.slots) == 1:
                raise
        self.metrics.batches_split.inc()
        await self.call(lambda engine: engine.free_memory())
        for half in batch.halves():
            try:
                await self._stages(half, None)
            except Exception as error:
                if says_out_of_memory(error):
                    raise out_of_memory(len(half.slots)) from error
                raise

    async def _stages(self, batch: Batch, free: Callable[[], None] | None) -> None:
        loop = asyncio.get_running_loop()
        forward, cancelled = functools.partial(batch.forward, loop, self._tell), batch.is_cancelled
        engine = batch.slots[0].request.engine or self._engine
        denoise = functools.partial(engine.denoise, on_event=forward, cancelled=cancelled)
        decode = functools.partial(engine.decode, on_event=forward, cancelled=cancelled)
        seconds = self.metrics.stage_seconds
        first, second = (loop.time(), 0.0), None
        try:
            denoised = await loop.run_in_executor(self._denoise, denoise, [slot.job for slot in batch.slots])
            first = (first[0], loop.time())
            seconds.labels("unet").observe(first[1] - first[0])
            seconds.labels("sae").observe(sum(over - began for step in batch.times for _, began, over in step.taps))
            async with self._decoding:
                if free is not None:
                    free()
                started = loop.time()
                await loop.run_in_executor(self._decode, decode, denoised)
                second = (started, max(started, batch.last_told))
                seconds.labels("vae").observe(second[1] - started)
        finally:
            contexts = [ticket.context for ticket in batch.tickets]
            first = (first[0], first[1] or loop.time())
            traces.record_batch(contexts, len(batch.slots), first, second, batch.times)

    def _free(self) -> None:
        self._busy = False
        self._start_next()

    # Tickets

    def _leave(self, ticket: Ticket) -> None:
        """The caller reads no more of it."""
        ticket.cancelled.set()
        self._unread.discard(ticket)
        if ticket in self._tickets:
            for job in self._batcher.jobs_of(ticket):
                self.metrics.steps.labels("saved").inc(job.steps)
        self._remove(ticket)
        self._tell_positions()

    def _tell(self, ticket: Ticket, event: Event) -> None:
        """Tell a request what happened; it ends with its last job, and not with the batch that others share."""
        ticket.tell(event)
        if isinstance(event, Result | NotFinite):
            ticket.unfinished -= 1
            if not ticket.unfinished:
                self._end(ticket)

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
