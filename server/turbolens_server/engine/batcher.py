"""What to run next: jobs of many requests put together into batches. Pure policy; it knows neither threads nor clocks.

Jobs that share a `BatchKey` can run together. *Between callers* the engine's work is shared evenly: who has had less of
it comes first, so a caller with a hundred requests does not slow one that has a single one; who comes newly, or comes
back, starts where those who wait stand, and gets nothing for the time it was away.

*Within a caller* each job gets its *place* when it arrives and keeps it: the number of its request plus its position
within it. The caller's job of the lowest place is its next. Hence

- the first job of a request is never overtaken by a later request of its caller, whatever their shapes;
- job i of a request is overtaken by at most i later requests of its caller: a large request shares the engine with
  small ones that come after it, and still advances by one place with each of them.

The next batch starts with the job that is first in this order, and the jobs of the same key that follow fill it up;
but where callers share it, none gets more lanes of it than the most modest of the others asks for, or a fourth
(:func:`most_of_one`).

Who was just answered is likely to ask again, and looks idle until then. Where callers shared a batch, those who are
back wait a moment for the others: else who has much waiting would start the next batch in each such moment, and who
asks for one thing at a time would always find it begun.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

from turbolens_server.engine.types import Job

R = TypeVar("R", bound=Hashable)

MAX_BATCH: Final = 8
"""Lanes that run together, unless the operator says otherwise: pictures, and the reference runs of their edits."""
_NEWEST_WEIGHT: Final = 0.25
"""Of the newest batch in the moving average of how long a lane takes."""
_PARTS: Final = 4
"""One of so many parts of a batch is any caller's, however little others ask for."""
_RECENT: Final = 2
"""Batches whose callers are taken for ones who will ask again."""
_WORTH_WAITING: Final = 0.1
"""Of the time that a batch of several callers took: more than an answer's way there and a request's way back, and so
little that one who stays away costs nobody much."""


class BatchKey(NamedTuple):
    """What jobs of one batch share."""

    height: int
    width: int
    steps: int
    timesteps: tuple[int, ...]
    skipped: int
    regions: int
    """With them the text is longer and the attention another kernel, which mates without any must not notice."""
    gate: bool
    """Likewise."""
    attributing: bool
    """It looks into attention layers, which compiled code does not show: it runs eagerly, and rounds otherwise."""


def batch_key(job: Job) -> BatchKey:
    """The key of a job: the shapes that the model runs at, and the timesteps it visits."""
    return BatchKey(
        job.height,
        job.width,
        job.steps,
        job.timesteps,
        job.skipped,
        len(job.regions),
        job.gate,
        job.attribute is not None,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Slot(Generic[R]):
    """One job of a request, waiting or running."""

    request: R
    index: int
    """Position of the job in its request."""
    job: Job
    place: tuple[int, int]
    """Order among its caller's: the request's number plus `index`, then the request's number."""
    caller: str
    group: Hashable
    """What it runs on; batches are of one."""

    @property
    def key(self) -> tuple[BatchKey, Hashable]:
        """What it shares with its batch."""
        return batch_key(self.job), self.group


@dataclasses.dataclass(frozen=True, slots=True)
class Shared:
    """A batch that several requests shared, and that has ended."""

    ended: float
    took_s: float
    lanes: int
    callers: frozenset[str]

    def start_at(self, lanes: int, back: Collection[str], wait_s: float) -> float:
        """When the next batch may start, 0 for at once.

        Args:
            lanes: that it would have now.
            back: callers who have something waiting.
            wait_s: how long it waits for requests, where it is smaller than this one; 0: never.
        """
        if lanes >= self.lanes or not wait_s:
            return 0.0
        missing = len(self.callers) > 1 and not self.callers <= set(back)
        return self.ended + (max(wait_s, _WORTH_WAITING * self.took_s) if missing else wait_s)


def most_of_one(waiting: Mapping[str, int], lately: Mapping[str, int], max_batch: int) -> dict[str, int]:
    """How many lanes of the next batch each caller may have, beside others who wait for all of it.

    As many as each of the others asks for, or did lately, but always a fourth: a caller who wants one picture at a time
    is answered in little more than what it and an equal take, and two who want many fill a batch. Who waits alone gets
    no fourth: the others may be back in the middle of this batch, and have the next one before them as well.

    Args:
        waiting: lanes that each caller waits for.
        lately: lanes that each had of the last batches.
        max_batch: lanes of a batch.
    """
    asked = {name: max(waiting.get(name, 0), lately.get(name, 0)) for name in {**lately, **waiting}}
    least = max(max_batch // _PARTS, 1) if len(waiting) > 1 else 1
    return {
        caller: max(least, min((lanes for name, lanes in asked.items() if name != caller), default=max_batch))
        for caller in waiting
    }


class Batcher(Generic[R]):
    """The queue of jobs. Times are seconds of any clock that does not go back."""

    def __init__(self, max_batch: int, wait_s: float) -> None:
        """Make an empty queue.

        Args:
            max_batch: lanes of a batch, at most; no job has more.
            wait_s: how long after a shared batch a smaller one waits for those just answered to come back, at least;
                0: not at all.
        """
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._slots: list[Slot[R]] = []  # by place, of all callers
        self._requests = 0
        self._had: dict[str, float] = {}
        """Lanes' steps that each caller has had, on a scale on which all who wait are near each other."""
        self._reached = 0.0
        """Where on that scale the last batch began."""
        self.first_come = False
        """Strictly by arrival, request by request: what is begun is finished first."""
        self._shared: Shared | None = None
        """The last batch, where it was one."""
        self._lane_s: dict[BatchKey, float] = {}
        self._expected: float | None = None
        """What a lane takes for each of its steps and pixels, until a batch has ended; None: nobody knows."""
        self._recent: collections.deque[collections.Counter[str]] = collections.deque(maxlen=_RECENT)
        """Lanes that each caller had of the last batches."""

    def __len__(self) -> int:
        """Jobs that wait."""
        return len(self._slots)

    @property
    def waiting(self) -> frozenset[R]:
        """Requests with a job that waits."""
        return frozenset(slot.request for slot in self._slots)

    def add(self, request: R, jobs: Sequence[Job], caller: str = "", group: Hashable = None) -> None:
        """Queue the jobs of a request, in order; they share batches with those of the same group."""
        number, self._requests = self._requests, self._requests + 1
        if not any(slot.caller == caller for slot in self._slots):
            self._had = {name: had for name, had in self._had.items() if had > self._reached}
            self._had[caller] = max(self._had.get(caller, 0.0), self._reached)
        for index, job in enumerate(jobs):
            slot = Slot(request, index, job, (number + index, number), caller, group)
            bisect.insort(self._slots, slot, key=lambda slot: slot.place)

    def drop(self, request: R) -> int:
        """Take out the jobs of a request that wait; returns how many there were."""
        before = len(self._slots)
        self._slots = [slot for slot in self._slots if slot.request != request]
        return before - len(self._slots)

    def start_at(self) -> float | None:
        """When the next batch may start, if nothing runs: 0 for at once, None where nothing waits.

        A batch waits only after one that several requests shared, only while it is smaller than that one, and only
        for `wait_s` from that one's end, or a tenth of its time where one of its callers is missing: those just
        answered are likely to ask again. An idle queue, and a request that was alone, never wait.
        """
        if not self._slots:
            return None
        if self._shared is None or self.first_come:
            return 0.0
        return self._shared.start_at(_lanes(self._next()), {slot.caller for slot in self._slots}, self._wait_s)

    def take(self) -> list[Slot[R]]:
        """Take out the next batch, in order; empty where nothing waits."""
        batch = self._next()
        if batch:
            self._reached = self._had.get(batch[0].caller, self._reached)
            self._recent.append(_lanes_of(batch))
        for slot in batch:
            self._had[slot.caller] = self._had.get(slot.caller, self._reached) + _work(slot)
        taken = {slot.place for slot in batch}
        self._slots = [slot for slot in self._slots if slot.place not in taken]
        return batch

    def _next(self) -> list[Slot[R]]:
        first = next(self._in_order(self._slots), None)
        if first is None:
            return []
        lately: collections.Counter[str] = collections.Counter()
        for recent in self._recent:
            lately |= recent
        most = {} if self.first_come else most_of_one(_lanes_of(self._slots), lately, self._max_batch)
        batch, free = [], self._max_batch
        had: collections.Counter[str] = collections.Counter()
        for slot in self._in_order([slot for slot in self._slots if slot.key == first.key], first):
            if slot.job.lanes > free:  # what fits would overtake it
                break
            if had[slot.caller] and had[slot.caller] + slot.job.lanes > most.get(slot.caller, self._max_batch):
                most[slot.caller] = 0  # likewise, of its caller's
                continue
            batch.append(slot)
            free -= slot.job.lanes
            had[slot.caller] += slot.job.lanes
        return batch

    def _in_order(self, slots: Sequence[Slot[R]], first: Slot[R] | None = None) -> Iterator[Slot[R]]:
        """Slots in the order in which they are served if nothing else comes; `first`, one of them, before all."""
        if self.first_come:
            yield from sorted(slots, key=lambda slot: (slot.place[1], slot.index))
            return
        by_caller: dict[str, collections.deque[Slot[R]]] = collections.defaultdict(collections.deque)
        for slot in slots:
            by_caller[slot.caller].append(slot)
        had = {caller: self._had.get(caller, self._reached) for caller in by_caller}
        while by_caller:
            caller = min(by_caller, key=lambda name: (had[name], by_caller[name][0].place))
            if first is not None:
                caller, first = first.caller, None
            slot = by_caller[caller].popleft()
            yield slot
            had[caller] += _work(slot)
            if not by_caller[caller]:
                del by_caller[caller]

    def expect(self, job: Job, took_s: float) -> None:
        """Jobs will take what this one did, and others by their steps and pixels, until a batch has ended."""
        self._expected = took_s / (job.lanes * _size(batch_key(job))) or None

    def ended(self, batch: Sequence[Slot[R]], started: float, now: float, *, whole: bool = True) -> None:
        """A batch that ran from `started` to `now` is done; one that stopped early does not tell how long jobs take."""
        shared = len({slot.request for slot in batch}) > 1
        callers = frozenset(slot.caller for slot in batch)
        self._shared = Shared(now, now - started, _lanes(batch), callers) if shared else None
        if not whole:
            return
        key, newest = batch_key(batch[0].job), (now - started) / _lanes(batch)
        known = self._lane_s.get(key, newest)
        self._lane_s[key] = known + _NEWEST_WEIGHT * (newest - known)

    def drain_s(self, running: Iterable[Slot[R]] = ()) -> float | None:
        """About how long all that waits and runs will take, as `takes_s` says."""
        return self.takes_s([slot.job for slot in (*self._slots, *running)])

    def takes_s(self, jobs: Iterable[Job]) -> float | None:
        """About how long jobs take in full batches, from the batches so far: those of other shapes by their steps and
        pixels. None where no batch has ended, and nothing is expected."""
        rates = [seconds / _size(key) for key, seconds in self._lane_s.items()]
        typical = sum(rates) / len(rates) if rates else self._expected
        if typical is None:
            return None
        keys = [(job.lanes, batch_key(job)) for job in jobs]
        return sum(lanes * self._lane_s.get(key, typical * _size(key)) for lanes, key in keys)

    def jobs_of(self, request: R) -> list[Job]:
        """The jobs of a request that wait."""
        return [slot.job for slot in self._slots if slot.request == request]


def _size(key: BatchKey) -> int:
    """What a lane's time grows with: its steps times its pixels."""
    return key.steps * key.height * key.width


def _work(slot: Slot[R]) -> int:
    """What a job takes of the engine: steps of its lanes."""
    return slot.job.lanes * slot.job.steps


def _lanes_of(slots: Sequence[Slot[R]]) -> collections.Counter[str]:
    """Lanes by caller."""
    lanes: collections.Counter[str] = collections.Counter()
    for slot in slots:
        lanes[slot.caller] += slot.job.lanes
    return lanes


def _lanes(batch: Sequence[Slot[R]]) -> int:
    return sum(slot.job.lanes for slot in batch)
