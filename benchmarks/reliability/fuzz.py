"""Bad input over a real socket: bytes and fields that no honest caller sends, to every method.

    python -m benchmarks.reliability.fuzz --requests 100000

The server is the program with `mini`, whose engine, unless `--engine real`, makes each picture at once: what is tried
is all that stands before an engine. A request that it calls its own fault (`INTERNAL`, `UNKNOWN`) fails the run. Such
requests, and with `--keep` all that show something which none before showed, are made as small as they can be and kept
in `--corpus`, from which later runs start; `tests/server/rpc/test_corpus.py` sends them again.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import grpc
import tyro
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2, status_pb2

from benchmarks.fleet.simulation import Curve
from benchmarks.reliability import corpus
from benchmarks.reliability.bad_requests import bad_request, methods
from benchmarks.reliability.corpus import OURS, Kept, Outcome, name_of
from benchmarks.reliability.results import save, say
from benchmarks.reliability.servers import Server, started, timed

SAES: Final = ("mini-saes", "nested=mini-nested", "temporal=mini-temporal", "mini-attention")
"""Of every kind that ships, so that fields of each can be served."""


@dataclasses.dataclass
class Sender:
    """Sends bytes as messages, and remembers what came back."""

    channel: grpc.aio.Channel
    codes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: list[tuple[MethodDescriptor, bytes, str]] = dataclasses.field(default_factory=list)
    showed: dict[str, tuple[MethodDescriptor, bytes, str]] = dataclasses.field(default_factory=dict)
    """The smallest request so far for each thing of interest, with its code."""
    slowest_s: float = 0.0

    async def send(self, method: MethodDescriptor, data: bytes) -> str:
        """One call; returns the name of its code."""
        start = time.perf_counter()
        outcome = await self.ask(method, data)
        self.slowest_s = max(self.slowest_s, time.perf_counter() - start)
        self.codes[outcome.code] += 1
        if outcome.code in OURS:
            self.faults.append((method, data, f"{outcome.code}: {outcome.text}"))
        self.note(method, data, outcome)
        return outcome.code

    def note(self, method: MethodDescriptor, data: bytes, outcome: Outcome) -> None:
        """Remember a request that shows something in fewer bytes than any before."""
        for shown in corpus.of_interest(method, data, outcome):
            if shown not in self.showed or len(data) < len(self.showed[shown][1]):
                self.showed[shown] = method, data, outcome.code

    async def ask(self, method: MethodDescriptor, data: bytes) -> Outcome:
        """One call that is not counted."""
        path = f"/{method.containing_service.full_name}/{method.name}"
        try:
            await _call(self.channel, method, path, data)
        except grpc.aio.AioRpcError as error:
            return _outcome(error)
        return Outcome("OK")


def _outcome(error: grpc.aio.AioRpcError) -> Outcome:
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status_pb2.Status.FromString(packed).details:
        if not detail.Unpack(info):
            detail.Unpack(bad)
    first = bad.field_violations[0] if bad.field_violations else error_details_pb2.BadRequest.FieldViolation()
    field = re.sub(r"\[.*?\]", "[]", first.field)
    return Outcome(error.code().name, info.reason, field, first.description or error.details() or "")


async def _call(channel: grpc.aio.Channel, method: MethodDescriptor, path: str, data: bytes) -> None:
    async def one() -> AsyncIterator[bytes]:
        yield data

    if method.client_streaming:
        async for _ in channel.stream_stream(path)(one(), timeout=60):
            pass
    elif method.server_streaming:
        async for _ in channel.unary_stream(path)(data, timeout=60):
            pass
    else:
        await channel.unary_unary(path)(data, timeout=60)


async def fuzz(
    sender: Sender,
    requests: int,
    seed: int,
    together: int,
    start_from: Mapping[str, Sequence[bytes]],
    watch: Callable[[int, Sender], None],
) -> None:
    """Send so many bad requests, some together."""
    every = methods()
    left = iter(range(requests))

    async def work() -> None:
        for number in left:
            draw = random.Random(f"{seed}/{number}")
            method = draw.choice(every)
            await sender.send(method, bad_request(method, draw, start_from.get(name_of(method), ())))
            if number % 1000 == 999:
                watch(number + 1, sender)

    await asyncio.gather(*(work() for _ in range(together)))


async def small(sender: Sender, together: int) -> list[Kept]:
    """The smallest requests that show all that was of interest; few, since one can show much."""
    found: dict[tuple[str, bytes], set[str]] = collections.defaultdict(set)
    by_name = {name_of(method): method for method in methods()}
    codes = {}
    for shown, (method, data, code) in sender.showed.items():
        found[name_of(method), data].add(shown)
        codes[name_of(method), data] = code
    room = asyncio.Semaphore(together)

    async def one(name: str, data: bytes, all_of: set[str]) -> Kept:
        async def shows(candidate: bytes) -> bool:
            outcome = await sender.ask(by_name[name], candidate)
            return all_of <= corpus.of_interest(by_name[name], candidate, outcome)

        async with room:
            return Kept(name, await corpus.minimised(by_name[name], data, shows), codes[name, data])

    kept = await asyncio.gather(*(one(name, data, all_of) for (name, data), all_of in found.items()))
    return list(dict.fromkeys(kept))


def run(server: Server, requests: int, seed: int, together: int, place: Path, keep: bool) -> dict[str, Any]:
    """Send and watch."""
    seen: list[dict[str, float]] = []
    start = time.monotonic()
    known = corpus.read(place)
    start_from: dict[str, list[bytes]] = collections.defaultdict(list)
    for one in known:
        start_from[one.method].append(one.data)

    def watch(done: int, sender: Sender) -> None:
        seen.append({"requests": done, "memory_mib": round(server.memory_mib(), 1)})
        if done % 5000 == 0:
            say(f"{done} requests, {seen[-1]['memory_mib']} MiB, {dict(sender.codes)}, {len(sender.showed)} shown")

    async def whole() -> Sender:
        options = [("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(server.target, options=options) as channel:
            sender = Sender(channel)
            await fuzz(sender, requests, seed, together, start_from, watch)
            if keep:
                by_name = {name_of(method): method for method in methods()}
                for one in known:
                    if (method := by_name.get(one.method)) is not None:
                        sender.note(method, one.data, await sender.ask(method, one.data))
                corpus.write(await small(sender, together), place)
            elif sender.faults:
                sender.showed = {shown: found for shown, found in sender.showed.items() if found[2] in OURS}
                corpus.write([*known, *await small(sender, together)], place)
            return sender

    sender = asyncio.run(whole())
    for _, _, told in sender.faults[:20]:
        say(told)
    first, last = seen[min(len(seen) - 1, len(seen) // 10)], seen[-1]
    return {
        "requests": requests,
        "seed": seed,
        "started_from": len(known),
        "codes": dict(sender.codes.most_common()),
        "faults_of_the_server": len(sender.faults),
        "server_alive": server.process.poll() is None,
        "memory_mib_first_and_last": [first["memory_mib"], last["memory_mib"]],
        "slowest_s": round(sender.slowest_s, 2),
        "seconds": round(time.monotonic() - start),
        "watched": seen,
    }


def main(
    requests: int = 100_000,
    seed: int = 0,
    together: int = 32,
    place: Path = corpus.PLACE,
    keep: bool = False,
    engine: Literal["at once", "real"] = "at once",
) -> None:
    """Fuzz.

    Args:
        requests: how many.
        seed: of all of them.
        together: under way at once.
        place: the corpus, a file.
        keep: write all of interest there, and not only faults of the server.
        engine: what makes the pictures of what can be served.
    """
    at_once = timed(Curve((1, 8), (0.0, 0.0), (0.0, 0.0)), {"sae": SAES, "gate": "mini"})
    flags = ["--max-seeds", "2", "--gate", "mini", "--sae", *SAES]
    with at_once if engine == "at once" else started(*flags) as server:
        result = run(server, requests, seed, together, place, keep)
    save("fuzz", {"engine": engine, **result})
    if result["faults_of_the_server"] or not result["server_alive"]:
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main)
