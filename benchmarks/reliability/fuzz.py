"""Bad input over a real socket: bytes and fields that no honest caller sends, to every method.

    python -m benchmarks.reliability.fuzz --requests 100000

The server is the program with `mini`, whose engine, unless `--engine real`, makes each picture at once: what is tried
is all that stands before an engine. A request that it calls its own fault (`INTERNAL`, `UNKNOWN`) is kept in
`--corpus` and fails the run; `tests/server/rpc/test_corpus.py` sends what is kept there again.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import grpc
import tyro
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from benchmarks.fleet.simulation import Curve
from benchmarks.places import ROOT
from benchmarks.reliability.results import save, say
from benchmarks.reliability.servers import Server, started, timed
from turbolens_proto.v1 import feature_service_pb2, generation_service_pb2, model_service_pb2, run_pb2, steering_pb2

CORPUS: Final = ROOT / "tests" / "server" / "rpc" / "corpus"
_OURS: Final = ("INTERNAL", "UNKNOWN")
_TEXTS: Final = (
    "", "mid.0", "up.0.0", "down.2.1", "mini", "a red star", "mid.0/features/3", "features/mid.0/3", "\x00", "\n{}",
    "../../etc/passwd", "%s%n", "é漢🙂", "\u202e", "a" * 3000, "label:star", 'label:"', "-frequency", "models/mini",
)  # fmt: skip
_WHOLE: Final = (0, 1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 100, 128, 255, 256, 512, 4096, -1, 2**31 - 1, -(2**31))
_LARGE: Final = (*_WHOLE, 2**32, 2**63 - 1, -(2**63))
_FLOATS: Final = (
    0.0,
    -0.0,
    0.25,
    0.5,
    1.0,
    -1.0,
    2.0,
    10.0,
    1e3,
    1e9,
    3e38,
    -3e38,
    1e-40,
    float("nan"),
    float("inf"),
    float("-inf"),
)
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_HUGE_PNG: Final = _PNG + b"\x00\x00\x00\rIHDR\xff\xff\xff\xff\xff\xff\xff\xff\x08\x00"
_BYTES: Final = (b"", b"\x00", _PNG, _HUGE_PNG, b"\xff" * 64)
_DEEP: Final = 6


def methods() -> list[MethodDescriptor]:
    """Every method of the contract."""
    files = (model_service_pb2, feature_service_pb2, generation_service_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return [method for service in services for method in service.methods]


def request_class(method: MethodDescriptor) -> type[Message]:
    """What a method takes."""
    return message_factory.GetMessageClass(method.input_type)


def honest(method: MethodDescriptor, draw: random.Random) -> Message:
    """A request that can be served."""
    run = run_pb2.Run(
        source=run_pb2.Source(prompt=run_pb2.PromptSource(text="a red star")),
        sampling=run_pb2.Sampling(steps=1),
        seeds=[draw.randrange(1000)],
    )
    if draw.random() < 0.7:
        feature = steering_pb2.WeightedFeature(feature=steering_pb2.FeatureRef(sae="mid.0", index=draw.randrange(64)))
        edit = steering_pb2.Edit(features=[feature], add=steering_pb2.AddEdit(strength=1.0, unit=steering_pb2.UNIT_RAW))
        box = steering_pb2.Box(left=0, top=0, right=0.5, bottom=1)
        edit.mask.boxes.boxes.append(box)
        run.edits.append(edit)
    if draw.random() < 0.5:
        run.features.saes.append("mid.0")
    request = request_class(method)()
    if "run" in method.input_type.fields_by_name:
        request.run.CopyFrom(run)  # type: ignore[attr-defined]
    elif "request" in method.input_type.fields_by_name:
        request.request.run.CopyFrom(run)  # type: ignore[attr-defined]
    elif "query" in method.input_type.fields_by_name:
        request.query = "star"  # type: ignore[attr-defined]
    return request


def value_of(field: FieldDescriptor, draw: random.Random, depth: int) -> Any:
    """A value at or past an edge of its type."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        assert field.message_type is not None
        made = message_factory.GetMessageClass(field.message_type)()
        scatter(made, draw, depth + 1)
        return made
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return draw.choice(_BYTES if field.type == FieldDescriptor.TYPE_BYTES else _TEXTS)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return draw.choice(_FLOATS)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return draw.choice((0, 1, 2, 3, 4, 9, 2**31 - 1))
    wide = field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
    number = draw.choice(_LARGE if wide else _WHOLE)
    unsigned = field.cpp_type in (FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_UINT32)
    return abs(number) if unsigned else number


def scatter(message: Message, draw: random.Random, depth: int = 0) -> None:
    """Set some fields of a message, at every depth, to values at or past their edges."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    for field in draw.sample(fields, min(len(fields), draw.choice((1, 1, 2, 3)))):
        if field.message_type is not None and depth >= _DEEP:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key = draw.choice(_TEXTS)
            scatter(getattr(message, field.name)[key], draw, depth + 1)
        elif field.is_repeated:
            count = draw.choice((0, 1, 1, 2, 3, 40))
            getattr(message, field.name).extend(value_of(field, draw, depth) for _ in range(count))
        elif field.message_type is not None:
            # Into what is there, so that most of an honest request stays honest.
            scatter(getattr(message, field.name), draw, depth + 1)
        else:
            setattr(message, field.name, value_of(field, draw, depth))


def damage(data: bytes, draw: random.Random) -> bytes:
    """Bytes of a message with some changed, left out, doubled or put in."""
    spoiled = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(spoiled) + 1)
        end = min(len(spoiled), at + draw.choice((1, 2, 8)))
        match draw.randrange(4):
            case 0 if at < len(spoiled):
                spoiled[at] = draw.randrange(256)
            case 1:
                del spoiled[at:end]
            case 2:
                spoiled[at:at] = spoiled[at:end] * draw.choice((1, 2, 50))
            case _:
                spoiled[at:at] = draw.randbytes(draw.choice((1, 2, 8, 64)))
    return bytes(spoiled)


def bad_request(method: MethodDescriptor, draw: random.Random) -> bytes:
    """One request as bytes: an honest one's fields, its bytes, or both, spoiled."""
    request = honest(method, draw)
    how = draw.randrange(4)
    if how != 0:
        for _ in range(draw.choice((1, 1, 2, 4))):
            scatter(request, draw)
    data = request.SerializeToString()
    return damage(data, draw) if how in (0, 1) else data


@dataclasses.dataclass
class Sender:
    """Sends bytes as messages, and remembers what came back."""

    channel: grpc.aio.Channel
    codes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: list[tuple[MethodDescriptor, bytes, str]] = dataclasses.field(default_factory=list)
    slowest_s: float = 0.0

    async def send(self, method: MethodDescriptor, data: bytes) -> str:
        """One call; returns the name of its code."""
        start = time.perf_counter()
        path = f"/{method.containing_service.full_name}/{method.name}"
        try:
            await _call(self.channel, method, path, data)
            code, details = "OK", ""
        except grpc.aio.AioRpcError as error:
            code, details = error.code().name, error.details() or ""
        self.slowest_s = max(self.slowest_s, time.perf_counter() - start)
        self.codes[code] += 1
        if code in _OURS:
            self.faults.append((method, data, f"{code}: {details}"))
        return code


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


async def fuzz(target: str, requests: int, seed: int, together: int, watch: Callable[[int, Sender], None]) -> Sender:
    """Send so many bad requests, some together."""
    every = methods()
    options = [("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        sender = Sender(channel)
        left = iter(range(requests))

        async def work() -> None:
            for number in left:
                draw = random.Random(f"{seed}/{number}")
                method = draw.choice(every)
                await sender.send(method, bad_request(method, draw))
                if number % 1000 == 999:
                    watch(number + 1, sender)

        await asyncio.gather(*(work() for _ in range(together)))
        return sender


def _keep(faults: Sequence[tuple[MethodDescriptor, bytes, str]], corpus: Path) -> None:
    corpus.mkdir(parents=True, exist_ok=True)
    for method, data, told in faults[:20]:
        name = f"{method.containing_service.name}.{method.name}.{hashlib.sha256(data).hexdigest()[:12]}"
        (corpus / name).write_bytes(data)
        say(f"kept {name}: {told}")


def run(server: Server, requests: int, seed: int, together: int, corpus: Path) -> dict[str, Any]:
    """Send and watch."""
    seen: list[dict[str, float]] = []
    start = time.monotonic()

    def watch(done: int, sender: Sender) -> None:
        seen.append({"requests": done, "memory_mib": round(server.memory_mib(), 1)})
        if done % 5000 == 0:
            say(f"{done} requests, {seen[-1]['memory_mib']} MiB, {dict(sender.codes)}")

    sender = asyncio.run(fuzz(server.target, requests, seed, together, watch))
    _keep(sender.faults, corpus)
    first, last = seen[min(len(seen) - 1, len(seen) // 10)], seen[-1]
    return {
        "requests": requests,
        "seed": seed,
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
    corpus: Path = CORPUS,
    engine: Literal["at once", "real"] = "at once",
) -> None:
    """Fuzz.

    Args:
        requests: how many.
        seed: of all of them.
        together: under way at once.
        corpus: folder for what the server calls its own fault.
        engine: what makes the pictures of what can be served.
    """
    at_once = timed(Curve((1, 8), (0.0, 0.0), (0.0, 0.0)))
    with at_once if engine == "at once" else started("--max-steps", "2", "--max-seeds", "2") as server:
        result = run(server, requests, seed, together, corpus)
    save("fuzz", {"engine": engine, **result})
    if result["faults_of_the_server"] or not result["server_alive"]:
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main)
