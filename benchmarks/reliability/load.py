"""Too many callers, a greedy one beside a modest one, and callers who leave.

python -m benchmarks.reliability.load
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import multiprocessing
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import tyro
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.fleet.simulation import Curve
from benchmarks.reliability.results import ms, save, say
from benchmarks.reliability.servers import Server, started, timed
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import generation_service_pb2_grpc, run_pb2

CURVE: Final = Curve((1, 8), (0.15, 0.5), (0.0, 0.0))
"""16 pictures a second in batches of eight: slow enough that callers on the same cores are not what is measured."""
PROMPT: Final = "a big red star on the left, night background"
_OPTIONS: Final = (
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", 2**26),
    ("grpc.use_local_subchannel_pool", 1),  # else all channels of a process share a connection
)
_RAW: Final = run_pb2.ImageOptions(format=run_pb2.IMAGE_FORMAT_RAW)


def request(seeds: Sequence[int], steps: int = 1) -> gs.GenerateRequest:
    """Pictures of one prompt, uncoded."""
    run = run_pb2.Run(
        source=run_pb2.Source(prompt=run_pb2.PromptSource(text=PROMPT)),
        sampling=run_pb2.Sampling(steps=steps),
        seeds=list(seeds),
    )
    return gs.GenerateRequest(run=run, image=_RAW)


@dataclasses.dataclass
class Seen:
    """What calls came to."""

    served_s: list[float] = dataclasses.field(default_factory=list)
    refused_s: list[float] = dataclasses.field(default_factory=list)
    codes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    pictures: int = 0
    over_time: list[tuple[float, float, str]] = dataclasses.field(default_factory=list)
    """When a call ended, how long it took, and its code."""


class Caller:
    """One caller on connections of its own, known by a token where it has one."""

    def __init__(self, target: str, token: str = "", connections: int = 1) -> None:
        self._channels = [grpc.aio.insecure_channel(target, options=_OPTIONS) for _ in range(connections)]
        self._stubs = [generation_service_pb2_grpc.GenerationServiceStub(channel) for channel in self._channels]
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None
        self._turn = 0
        self.seen = Seen()

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    async def call(self, asked: gs.GenerateRequest, timeout: float = 60.0) -> gs.GenerateResponse | None:
        """One call; None where it was refused."""
        self._turn += 1
        stub = self._stubs[self._turn % len(self._stubs)]
        start = time.perf_counter()
        answer: gs.GenerateResponse | None = None
        try:
            answer = await stub.Generate(asked, timeout=timeout, metadata=self._metadata)
            code = "OK"
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        took = time.perf_counter() - start
        self.seen.codes[code] += 1
        self.seen.over_time.append((time.monotonic(), took, code))
        (self.seen.served_s if answer is not None else self.seen.refused_s).append(took)
        self.seen.pictures += len(answer.generations) if answer is not None else 0
        return answer


async def probe(target: str, took: list[float]) -> None:
    """Ask for health as a kubelet would, until cancelled: a new connection each time."""
    while True:
        start = time.perf_counter()
        async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        took.append(time.perf_counter() - start)
        await asyncio.sleep(0.25)


async def closed_loop(caller: Caller, seconds: float, together: int, seeds: int = 1) -> None:
    """So many calls always under way, for so long."""
    end = time.monotonic() + seconds

    async def one(at: int) -> None:
        number = at
        while time.monotonic() < end:
            await caller.call(request([number * seeds + i for i in range(seeds)]))
            number += together

    await asyncio.gather(*(one(at) for at in range(together)))


async def open_loop(caller: Caller, seconds: float, rate: float) -> None:
    """Calls at random times, whatever has become of those before."""
    draw, calls = random.Random(0), []
    end = time.monotonic() + seconds
    due = time.monotonic()
    number = 0
    while due < end:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        calls.append(asyncio.create_task(caller.call(request([number]))))
        number += 1
    await asyncio.gather(*calls)


async def overload(server: Server, seconds: float) -> dict[str, Any]:
    """Ten times what the server can, beside the most that it can."""
    async with Caller(server.target) as caller:
        say("the best without overload")
        start = time.monotonic()
        await closed_loop(caller, seconds / 3, 16)
        best = caller.seen.pictures / (time.monotonic() - start)
    say(f"{best:.1f} pictures a second; ten times as many calls for {seconds:.0f} s")
    health: list[float] = []
    before = server.handled("/Generate")
    async with Caller(server.target, connections=4) as caller:
        probing = asyncio.create_task(probe(server.target, health))
        start = time.monotonic()
        await open_loop(caller, seconds, 10 * best)
        elapsed = time.monotonic() - start
        probing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await probing
    seen = caller.seen
    sent = seen.codes.total()
    # A stream that gRPC sends back before any handler (its connection is full) was never accepted: HTTP/2 promises that
    # nothing was done for it, and callers that retry send it again by themselves. So it is a refusal. The server's own
    # count says how many calls came further; of those, each must have had its answer.
    handled = server.handled("/Generate") - before
    lost = handled - seen.codes["OK"] - seen.codes["RESOURCE_EXHAUSTED"]
    return {
        "seconds": seconds,
        "best_pictures_per_s": round(best, 1),
        "sent": sent,
        "codes": dict(seen.codes),
        "refused_before_a_handler": sent - handled,
        "accepted_and_lost": lost,
        "refusal_ms_p50": ms(seen.refused_s, 0.5),
        "refusal_ms_p99": ms(seen.refused_s, 0.99),
        "served_s_p95": round(ms(seen.served_s, 0.95) / 1000, 2),
        "health_ms_p99": ms(health, 0.99),
        "health_ms_most": ms(health, 1.0),
        "pictures_per_s": round(seen.pictures / elapsed, 1),
        "throughput_of_best": round(seen.pictures / elapsed / best, 3),
        # Of the refusals, very many, one in ten.
        "calls": [
            [round(at - start, 2), round(took, 4), code]
            for number, (at, took, code) in enumerate(seen.over_time)
            if code == "OK" or number % 10 == 0
        ],
    }


def _neighbour(target: str, token: str, seconds: float, together: int, seeds: int) -> int:
    """Pictures that a caller gets who always has so many requests under way."""

    async def call() -> int:
        async with Caller(target, token) as caller:
            await closed_loop(caller, seconds, together, seeds)
        return caller.seen.pictures

    return asyncio.run(call())


async def greedy(server: Server, tokens: Sequence[str], seconds: float) -> dict[str, Any]:
    """A caller of one picture at a time, beside an equal and beside one who always has 32 requests of four waiting.

    The other is a process of its own: what it does with its many answers must not keep the modest one from asking.
    """
    found: dict[str, Any] = {"seconds": seconds}
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as elsewhere:
        await loop.run_in_executor(elsewhere, _neighbour, server.target, tokens[1], 0.5, 1, 1)  # imports, first batches
        for name, together, seeds in (("an equal", 1, 1), ("a greedy one", 32, 4)):
            there = server.target, tokens[1], seconds, together, seeds
            async with Caller(server.target, tokens[0]) as modest:
                other = loop.run_in_executor(elsewhere, _neighbour, *there)
                await closed_loop(modest, seconds, 1)
                pictures = await other
            key = name.replace(" ", "_")
            found[f"p95_ms_beside_{key}"] = ms(modest.seen.served_s, 0.95)
            found[f"calls_beside_{key}"] = dict(modest.seen.codes)
            found[f"pictures_of_{key}"] = pictures
            say(f"beside {name}: p95 {found[f'p95_ms_beside_{key}']} ms")
    found["times"] = round(found["p95_ms_beside_a_greedy_one"] / found["p95_ms_beside_an_equal"], 2)
    return found


async def leaving(server: Server, calls: int) -> dict[str, Any]:
    """Half of all callers leave at a random moment; the others' pictures beside those of batches as large that nobody
    left."""
    steps, together = 4, 8
    draw = random.Random(0)
    stays = [draw.random() < 0.5 for _ in range(calls)]
    room = asyncio.Semaphore(together)
    unlike: collections.Counter[str] = collections.Counter()

    async def pictures() -> dict[int, gs.Generation]:
        made: dict[int, gs.Generation] = {}
        async with Caller(server.target) as caller:

            async def one(seed: int) -> None:
                async with room:
                    task = asyncio.create_task(caller.call(request([seed], steps)))
                    if not stays[seed]:
                        await asyncio.wait({task}, timeout=draw.uniform(0.0, 0.6))
                        task.cancel()
                        with contextlib.suppress(asyncio.CancelledError):
                            await task
                        return
                    answer = await task
                    if answer is not None:
                        made[seed] = answer.generations[0]

            await asyncio.gather(*(one(seed) for seed in range(calls)))
        return made

    before = [server.metric(f'turbolens_unet_steps_total{{fate="{fate}"}}') for fate in ("used", "saved", "wasted")]
    disturbed = await pictures()
    after = [server.metric(f'turbolens_unet_steps_total{{fate="{fate}"}}') for fate in ("used", "saved", "wasted")]
    say("and again, each alone and in a batch as large as its was")
    largest = 0
    async with Caller(server.target) as caller:
        for seed, one in disturbed.items():
            for size, beside in {1: "alone", one.batch_size: "as_large"}.items():
                answer = await caller.call(request([seed, *range(calls, calls + size - 1)], steps))
                assert answer is not None
                again = answer.generations[0]
                assert again.batch_size == size
                difference = max((abs(a - b) for a, b in zip(one.image.data, again.image.data, strict=True)), default=0)
                largest, unlike[beside] = max(largest, difference), unlike[beside] + (difference > 0)
    used, saved, wasted = (int(b - a) for a, b in zip(before, after, strict=True))
    return {
        "calls": calls,
        "left": calls - sum(stays),
        "survivors": len(disturbed),
        "survivors_expected": sum(stays),
        "survivors_unlike_as_large": unlike["as_large"],
        "survivors_unlike_alone": unlike["alone"],
        "largest_difference_of_255": largest,
        "steps_used": used,
        "steps_saved": saved,
        "steps_wasted": wasted,
    }


def _tokens_file(folder: Path) -> tuple[Path, list[str]]:
    names = ["modest", "other"]
    entries = [
        f'[[token]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n' for name in names
    ]
    path = folder / "tokens.toml"
    path.write_text("".join(entries))
    return path, names


def main(only: tuple[str, ...] = ("overload", "greedy", "leaving"), seconds: float = 60.0, calls: int = 200) -> None:
    """Load.

    Args:
        only: the scenarios.
        seconds: of overload, and half of it beside each neighbour.
        calls: of which half leave.
    """
    if "overload" in only:
        with timed(CURVE, {"metrics_port": _METRICS_PORT}) as server:
            save("overload", asyncio.run(overload(server, seconds)))
    if "greedy" in only:
        with tempfile.TemporaryDirectory() as folder:
            path, tokens = _tokens_file(Path(folder))
            with timed(CURVE, {"tokens": str(path)}) as server:
                save("greedy", asyncio.run(greedy(server, tokens, seconds / 2)))
    if "leaving" in only:
        with started(metrics_port=_METRICS_PORT) as server:
            save("leaving", asyncio.run(leaving(server, calls)))


_METRICS_PORT: Final = 52090


if __name__ == "__main__":
    tyro.cli(main)
