"""Requests in the queue, and the batches that their jobs run in."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from opentelemetry.context import Context

from turbolens_server.engine.batcher import Slot
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Event, FeaturesReady, NotFinite, Result, SparseCodes, StepDone, StepTimes
from turbolens_server.rpc import traces
from turbolens_server.rpc.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Queued:
    """A request waits behind `position` others; told again as they go."""

    position: int


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request from its arrival to its end."""

    unfinished: int
    """Jobs whose end has not been told."""
    arrived: float
    deadline: float | None
    """On the loop's clock, like `arrived`; None: none."""
    caller: str = ""
    engine: Engine | None = None
    """What its jobs run on."""
    context: Context = dataclasses.field(default_factory=traces.here)
    """Where its spans belong."""
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Nobody waits for it any more; read by the engine's threads."""
    position: int = -1
    started: float | None = None
    largest_batch: int = 0
    undelivered_bytes: int = 0
    error: Exception | None = None
    _events: asyncio.Queue[Queued | Event | None] = dataclasses.field(default_factory=asyncio.Queue)
    # Grows to the events of the request at most, which admission has counted; None is the end.

    def tell(self, event: Queued | Event) -> None:
        """Something happened."""
        self.undelivered_bytes += _size(event)
        self._events.put_nowait(event)

    async def next(self) -> Queued | Event | None:
        """What happened next; None where nothing more comes."""
        event = await self._events.get()
        if event is not None:
            self.undelivered_bytes -= _size(event)
        return event

    def move(self, position: int) -> None:
        """Say where it stands, where that is new."""
        if position != self.position:
            self.position = position
            self.tell(Queued(position))

    def end(self, error: Exception | None = None) -> None:
        """Say that nothing more comes."""
        self.error = error
        self._events.put_nowait(None)


class Batch:
    """Jobs that run together."""

    def __init__(self, slots: Sequence[Slot[Ticket]], told: set[tuple[object, ...]] | None = None) -> None:
        self.slots = slots
        self._told = set() if told is None else told
        """Events that callers have had, so that a second run of a job does not tell them again."""
        self._steps = 0
        """Steps that have been taken."""
        self.times: list[StepTimes] = []
        """Of the steps that have been taken, where the engine tells."""
        self.last_told = 0.0
        """When the last picture was told, on the loop's clock: its caller may have it before the loop comes to see that
        the batch is over, and its trace shall not say that it was decoded after it was answered."""
        self._left_at: dict[int, int] = {}
        """Steps that had been taken when a row was first seen to be cancelled, by row."""

    @property
    def tickets(self) -> set[Ticket]:
        """Its requests."""
        return {slot.request for slot in self.slots}

    def halves(self) -> tuple[Batch, Batch]:
        """The same jobs in two batches, that tell nobody anything twice."""
        middle = len(self.slots) // 2
        return Batch(self.slots[:middle], self._told), Batch(self.slots[middle:], self._told)

    def is_cancelled(self, row: int) -> bool:
        """Whether nobody waits for a job any more; asked in the engine's thread before each step."""
        cancelled = self.slots[row].request.cancelled.is_set()
        if cancelled:
            self._left_at.setdefault(row, self._steps)
        return cancelled

    @property
    def served_nobody(self) -> bool:
        """Whether it ended because all had left, maybe long before its last step."""
        return len(self._left_at) == len(self.slots)

    def forward(self, loop: asyncio.AbstractEventLoop, tell: Callable[[Ticket, Event], None], event: Event) -> None:
        """Have the loop tell an event of the engine to the request that it belongs to; called in the engine's
        threads."""
        slot = self.slots[event.job]
        if isinstance(event, StepDone):
            self._steps = max(self._steps, event.step + 1)
            if event.times is not None and event.step == len(self.times):
                self.times.append(event.times)
        elif isinstance(event, Result | NotFinite):
            self.last_told = time.monotonic()
        key = (slot.request, slot.index, *_what(event))
        if key in self._told:
            return
        self._told.add(key)
        loop.call_soon_threadsafe(tell, slot.request, dataclasses.replace(event, job=slot.index))

    def count_steps(self, metrics: Metrics) -> None:
        """Count what became of its steps, once it has ended."""
        for row, slot in enumerate(self.slots):
            left_at = self._left_at.get(row, self._steps)
            metrics.steps.labels("used").inc(left_at)
            metrics.steps.labels("wasted").inc(self._steps - left_at)
            metrics.steps.labels("saved").inc(slot.job.steps - self._steps if row in self._left_at else 0)


def _what(event: Event) -> tuple[object, ...]:
    """What tells an event of a job from its others."""
    match event:
        case FeaturesReady():
            return "features", event.codes.sae, event.codes.step
        case StepDone():
            return "step", event.step
        case Result() | NotFinite():
            return ("end",)


def _size(event: Queued | Event) -> int:
    """Bytes of an event's arrays."""
    match event:
        case Result():
            codes = sum(_codes_size(each) for each in event.features)
            return event.latents.nbytes + codes + (0 if event.picture is None else event.picture.nbytes)
        case FeaturesReady():
            return _codes_size(event.codes)
        case StepDone(preview=preview) if preview is not None:
            return int(preview.nbytes)
        case _:
            return 0


def _codes_size(codes: SparseCodes) -> int:
    return codes.counts.nbytes + codes.indices.nbytes + codes.values.nbytes
