"""What a connection may do before a call is looked at."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2
from serve import serve

from tests import messages
from turbolens_server.rpc import transport

GENERATE = "/turbolens.v1.GenerationService/Generate"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
PING = b"\0\0\x08\x06\0\0\0\0\0" + b"harmless"
ACKNOWLEDGED = b"\0\0\0\4\1\0\0\0\0"
HEADERS, DATA, RESET = 1, 0, 3


def raw(running, method: str = GENERATE):
    return running.channel.unary_unary(method)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_compressed_call_is_refused_before_it_is_unpacked(running, compression):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(running)(bytes(1000), compression=compression)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "disabled" in caught.value.details()
    await running.generation.Generate(messages.generate(prompt=""))


async def test_a_request_over_the_limit_is_refused(running):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(running)(bytes(transport.MAX_REQUEST_BYTES + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("message", [b"\xff", b"\x0a\xff\xff", b"\x0a\x02\xff\xfe"], ids=["tag", "length", "utf-8"])
async def test_bytes_that_are_no_message_are_the_callers_fault(running, log_lines, message):
    with pytest.raises(grpc.aio.AioRpcError, match=r"no turbolens\.v1\.GenerateRequest") as caught:
        await raw(running)(message, metadata=[("x-request-id", "garbled")])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "garbled"
    (line,) = [line for line in log_lines if line["event"] == "rpc"]
    assert (line["request_id"], line["code"], line["reason"]) == ("garbled", "INVALID_ARGUMENT", "MALFORMED_MESSAGE")


async def test_one_connection_holds_so_many_calls_at_once(fake):
    fake.gate.clear()
    async with serve(fake, max_queue=500, grace_s=10_000) as running:
        request = messages.generate(prompt="", seeds=[1]).SerializeToString()
        calls = [asyncio.ensure_future(ask_until_taken(running, request)) for _ in range(150)]
        await asyncio.sleep(1)
        assert running.serving._readiness.ready.queue.waiting + 1 <= transport.MAX_STREAMS  # one runs
        fake.gate.set()
        assert len(await asyncio.gather(*calls)) == 150


async def ask_until_taken(running, request: bytes) -> bytes:
    """What a caller's channel does by itself where it retries: calls that begin before it knows the bound are sent back
    untouched."""
    while True:
        try:
            return await raw(running)(request)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            await asyncio.sleep(0.1)


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


def opened(stream: int, message: bytes) -> bytes:
    """A call whose caller has sent its request and will send no more."""
    said = {":method": "POST", ":scheme": "http", ":path": GENERATE, ":authority": "x", "te": "trailers"}
    fields = {**said, "content-type": "application/grpc"}.items()
    head = b"".join(b"\0" + b"".join(bytes([len(part)]) + part.encode() for part in field) for field in fields)
    body = b"\0" + len(message).to_bytes(4, "big") + message
    return frame(HEADERS, 4, stream, head) + frame(DATA, 1, stream, body)


def resident_mib() -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc for memory")
async def test_streams_opened_and_reset_at_once_keep_memory_and_health_bounded(running, log_lines):
    host, _, port = running.address.rpartition(":")
    message = messages.generate(prompt="", seeds=[1]).SerializeToString()
    health, waited = HealthStub(running.channel), []
    await health.Check(health_pb2.HealthCheckRequest())
    before = resident_mib()
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + ACKNOWLEDGED)
    cancel = (8).to_bytes(4, "big")
    for first in range(1, 2 * 4000, 2 * 500):
        streams = range(first, first + 2 * 500, 2)
        writer.write(b"".join(opened(stream, message) for stream in streams))
        await writer.drain()
        started = time.monotonic()
        await health.Check(health_pb2.HealthCheckRequest())
        waited.append(time.monotonic() - started)
        writer.write(b"".join(frame(RESET, 0, stream, cancel) for stream in streams))
        await writer.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1 << 20), 0.01)
    writer.close()
    # Some did arrive; without the bound more than 1,500 of them were begun for nobody, here as from several callers at
    # once, where health waited 23 seconds.
    assert 50 < sum(line["event"] == "rpc" for line in log_lines) < 1000
    assert resident_mib() - before < 100
    assert max(waited) < 10
    await running.generation.Generate(messages.generate(prompt="", seeds=[1]))


async def test_connections_are_bounded(fake, monkeypatch):
    monkeypatch.setattr(transport, "MAX_CONNECTIONS", 3)
    async with serve(fake) as running, contextlib.AsyncExitStack() as stack:
        host, _, port = running.address.rpartition(":")
        answered = []
        for _ in range(6):
            reader, writer = await asyncio.open_connection(host, int(port))
            stack.callback(writer.close)
            writer.write(PREFACE)
            answered.append(bool(await asyncio.wait_for(reader.read(9), 5)))
        assert answered == [True] * 3 + [False] * 3


async def test_a_connection_that_says_nothing_is_ended(fake, monkeypatch):
    monkeypatch.setattr(transport, "HANDSHAKE_S", 0.5)
    async with serve(fake) as running:
        host, _, port = running.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(30):
            while await reader.read(4096):  # what the server says of itself, and then the end
                pass
        writer.close()
        await running.generation.Generate(messages.generate(prompt=""))


async def test_who_pings_without_end_is_disconnected(running):
    host, _, port = running.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + PING * 50)
    seen = b""
    async with asyncio.timeout(30):
        while piece := await reader.read(4096):
            seen += piece
    assert b"too_many_pings" in seen
    writer.close()
    health = HealthStub(running.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_tools_list_and_describe_the_services_in_both_versions_of_reflection(running, version):
    ask = running.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    (listed,) = [answer async for answer in ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))]
    names = {service.name for service in listed.list_services_response.service}
    both = {f"grpc.reflection.{each}.ServerReflection" for each in ("v1", "v1alpha")}
    assert {"turbolens.v1.GenerationService", "grpc.health.v1.Health", *both} <= names
    questions = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in sorted(names)]
    answers = [answer.file_descriptor_response.file_descriptor_proto async for answer in ask(iter(questions))]
    for name, files in zip(sorted(names), answers, strict=True):
        protos = [FileDescriptorProto.FromString(file) for file in files]
        assert name in {f"{proto.package}.{service.name}" for proto in protos for service in proto.service}
