"""A fleet as discrete events. What runs together is decided by the server's own `Batcher`, which knows no clock.

Of a server there are two measured numbers for every batch size, the seconds of its two stages; of a call, what it costs
beyond them (`overhead_s`). Everything else is the program: places in the queue, batches, the wait after a shared batch,
limits, two stages that overlap where there is a GPU.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from turbolens_server.engine.batcher import Batcher, Slot
from turbolens_server.engine.types import Job

Policy = Literal["round robin", "random", "least loaded", "one queue"]
_JOB = Job("", 0, 1, 512, 512)
_RETRY_S = 0.2
"""What the SDK waits before it asks another server, where one was lost."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Seconds of a batch by its size, straight between the sizes that were measured."""

    sizes: tuple[int, ...]
    denoise_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    pipelined: bool = False
    """Whether a batch is decoded while the next one is denoised."""

    def stages(self, size: int) -> tuple[float, float]:
        """Seconds of both stages of a batch."""
        return float(np.interp(size, self.sizes, self.denoise_s)), float(np.interp(size, self.sizes, self.decode_s))

    def pictures_per_s(self, size: int) -> float:
        """What one server makes where every batch has this size."""
        denoise, decode = self.stages(size)
        return size / (max(denoise, decode) if self.pipelined else denoise + decode)

    def serving(self, pictures_per_s: float, size: int) -> Curve:
        """The same but slower in batches: one that makes so many pictures a second in batches of a size."""
        factor = self.pictures_per_s(size) / pictures_per_s
        slower = [1 + (factor - 1) * (of - 1) / (size - 1) for of in self.sizes]
        denoise, decode = (
            tuple(s * f for s, f in zip(stage, slower, strict=True)) for stage in (self.denoise_s, self.decode_s)
        )
        return dataclasses.replace(self, denoise_s=denoise, decode_s=decode)

    @classmethod
    def of_bench(cls, file: Path, steps: int = 1) -> Curve:
        """The curve that `turbolens bench` measured: with the features of all blocks.

        Both stages share one GPU, and how far they overlap there was not measured apart: they count as one after the
        other.
        """
        cases = [case for case in json.loads(file.read_text())["cases"] if case["label"]["steps"] == steps]
        medians = {
            case["label"]["pictures"]: {row["name"]: row["median_ms"] / 1000 for row in case["rows"]} for case in cases
        }
        sizes = tuple(sorted(medians))
        denoise = tuple(medians[size]["features only"] for size in sizes)
        decode = tuple(medians[size]["all features"] - medians[size]["features only"] for size in sizes)
        return cls(sizes, denoise, decode)


@dataclasses.dataclass(frozen=True)
class Fleet:
    """Servers, and how callers find one."""

    curve: Curve
    servers: int
    policy: Policy = "round robin"
    max_batch: int = 8
    batch_wait_s: float = 0.005
    max_queue: int = 64
    """Requests that may wait at a server; one more is refused."""
    overhead_s: float = 0.0
    """Of a call beyond its batch: sending, checking, coding."""
    cold_start_s: float = 60.0
    """From a server's loss to another's first answer."""
    losses: tuple[float, ...] = ()
    """When a server is lost, as spot machines are: the one that has lived longest."""


@dataclasses.dataclass(eq=False)
class Request:
    """A call, from its arrival to its answer."""

    arrived: float
    pictures: int
    unfinished: int = 0
    done: float | None = None
    refused: bool = False
    sent_again: int = 0


@dataclasses.dataclass(eq=False)
class _Server:
    queue: Batcher[Request]
    ready: bool = True
    lost: bool = False
    denoising: bool = False
    decode_free: float = 0.0
    running: int = 0
    busy_s: float = 0.0
    batches: list[list[Slot[Request]]] = dataclasses.field(default_factory=list)

    @property
    def load(self) -> int:
        return len(self.queue) + self.running


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a simulated load."""

    latencies_s: npt.NDArray[np.float64]
    """Of the requests that were answered."""
    refused: int
    sent_again: int
    busy: float
    """Share of the time that a server denoises or, one after the other, decodes."""
    mean_batch: float

    def quantile(self, q: float) -> float:
        """Seconds within which a share of the requests was answered."""
        return float(np.quantile(self.latencies_s, q)) if len(self.latencies_s) else float("nan")


class _Run:
    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.random = random.Random(seed)
        self.order = itertools.count()
        self.events: list[tuple[float, int, Any]] = []
        self.turn = itertools.count()
        self.shared = self._queue() if fleet.policy == "one queue" else None
        self.servers = [self._server() for _ in range(fleet.servers)]
        self.batches: list[int] = []

    def _queue(self) -> Batcher[Request]:
        return Batcher(self.fleet.max_batch, self.fleet.batch_wait_s)

    def _server(self) -> _Server:
        return _Server(self._queue() if self.shared is None else self.shared)

    def at(self, time: float, what: Any) -> None:
        heapq.heappush(self.events, (time, next(self.order), what))

    def arrive(self, request: Request, now: float) -> None:
        ready = [server for server in self.servers if server.ready]
        if not ready:
            self.at(now + _RETRY_S, lambda later: self.arrive(request, later))
            return
        match self.fleet.policy:
            case "round robin" | "one queue":
                server = ready[next(self.turn) % len(ready)]
            case "random":
                server = self.random.choice(ready)
            case "least loaded":
                server = min(ready, key=lambda one: (one.load, self.random.random()))
        if len(server.queue.waiting) >= self.fleet.max_queue * (1 if self.shared is None else len(ready)):
            request.refused = True
            return
        request.unfinished = request.pictures
        server.queue.add(request, [_JOB] * request.pictures)
        for one in [server] if self.shared is None else ready:
            self.start(one, now)

    def start(self, server: _Server, now: float) -> None:
        if server.denoising or not server.ready or (start_at := server.queue.start_at()) is None:
            return
        if start_at > now:
            self.at(start_at, lambda later: self.start(server, later))
            return
        batch = server.queue.take()
        denoise, decode = self.fleet.curve.stages(len(batch))
        server.denoising = True
        server.running += len(batch)
        server.batches.append(batch)
        server.busy_s += denoise if self.fleet.curve.pipelined else denoise + decode
        self.batches.append(len(batch))
        began = max(now + denoise, server.decode_free)
        done = began + decode
        server.decode_free = done

        def free(later: float) -> None:
            server.denoising = False
            self.start(server, later)

        def end(later: float) -> None:
            if server.lost:
                return
            server.batches.remove(batch)
            server.running -= len(batch)
            server.queue.ended(batch, now, later)
            for slot in batch:
                slot.request.unfinished -= 1
                if not slot.request.unfinished:
                    slot.request.done = later
            if not self.fleet.curve.pipelined:
                free(later)

        if self.fleet.curve.pipelined:
            self.at(began, free)
        self.at(done, end)

    def lose(self, now: float) -> None:
        """A server goes with all that it has; its callers ask another, and a new one starts."""
        server = next((one for one in self.servers if one.ready), None)
        if server is None:
            return
        server.lost, server.ready = True, False
        orphans = {slot.request for batch in server.batches for slot in batch}
        if self.shared is None:
            orphans |= server.queue.waiting
        for request in sorted(orphans, key=lambda one: one.arrived):
            server.queue.drop(request)
            request.sent_again += 1
            self.at(now + _RETRY_S, lambda later, request=request: self.arrive(request, later))
        self.servers.remove(server)

        def begin(later: float) -> None:
            self.servers.append(new := self._server())
            self.start(new, later)

        self.at(now + self.fleet.cold_start_s, begin)


def poisson(rate: float, seconds: float, seed: int, pictures: int = 1) -> list[Request]:
    """Calls that come independently of each other, of so many pictures each, `rate` calls a second."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, size=int(rate * seconds * 1.5) + 10))
    return [Request(float(time), pictures) for time in times if time < seconds]


def simulate(fleet: Fleet, requests: Sequence[Request], seed: int = 0) -> Outcome:
    """Run a load through a fleet to its last answer."""
    run = _Run(fleet, seed)
    for request in requests:
        run.at(request.arrived, lambda now, request=request: run.arrive(request, now))
    for time in fleet.losses:
        run.at(time, run.lose)
    now = 0.0
    while run.events:
        now, _, what = heapq.heappop(run.events)
        what(now)
    latencies = [one.done - one.arrived + fleet.overhead_s for one in requests if one.done is not None]
    return Outcome(
        np.array(latencies),
        sum(one.refused for one in requests),
        sum(one.sent_again for one in requests),
        sum(server.busy_s for server in run.servers) / (now * fleet.servers) if now else 0.0,
        float(np.mean(run.batches)) if run.batches else 0.0,
    )


def plan(fleet: Fleet, requests: Sequence[Request], p99_s: float, most: int = 512) -> Iterator[tuple[int, Outcome]]:
    """Fleets of rising size, each with what comes of the load, to the first whose p99 is kept and that refuses nobody.

    Raises:
        ValueError: none of them is large enough, or one call alone takes longer.
    """
    pictures = sum(one.pictures for one in requests)
    alone = simulate(dataclasses.replace(fleet, servers=1), [Request(0.0, requests[0].pictures)]).quantile(1.0)
    if alone > p99_s:
        raise ValueError(f"one call alone takes {alone:.3f} s; no number of servers keeps a p99 of {p99_s:g} s")
    least = pictures / requests[-1].arrived / fleet.curve.pictures_per_s(fleet.max_batch)
    for servers in range(max(1, int(least)), most + 1):
        fresh = [Request(one.arrived, one.pictures) for one in requests]
        outcome = simulate(dataclasses.replace(fleet, servers=servers), fresh)
        yield servers, outcome
        if not outcome.refused and outcome.quantile(0.99) <= p99_s:
            return
    raise ValueError(f"more than {most} servers")
