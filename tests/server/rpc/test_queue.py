"""The queue: order, positions, fullness, leaving it, and callers who read slowly."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import pytest
from fake_engine import FakeEngine, an_info
from google.rpc import error_details_pb2, status_pb2

from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import run_pb2 as run


def ask(running, seed: int, **options) -> asyncio.Future:
    return asyncio.ensure_future(
        running.generation.Generate(gs.GenerateRequest(prompt={"text": ""}, seeds=[seed]), **options)
    )


async def started(running) -> None:
    assert await asyncio.to_thread(running.engine.started.wait, 5)


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def waiting(running) -> int:
    return running.serving._room.ready.scheduler.waiting


async def test_a_full_queue_says_when_to_come_back_and_then_takes_more(running):
    running.engine.gate.clear()
    calls = [ask(running, 0)]
    await started(running)
    for seed in (1, 2):
        calls.append(ask(running, seed))
        await until(lambda seed=seed: waiting(running) == seed)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(running, 3)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(caught.value.trailing_metadata())
    assert int(trailing["grpc-retry-pushback-ms"]) == 1000
    retry, info = error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
    details = status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).details
    assert any(detail.Unpack(retry) for detail in details)
    assert any(detail.Unpack(info) for detail in details)
    assert retry.retry_delay.seconds == 1
    assert (info.reason, info.domain) == ("QUEUE_FULL", "turbolens")
    running.engine.gate.set()
    await asyncio.gather(*calls)
    await ask(running, 4)
    assert running.engine.batches == [[0], [1], [2], [4]]


async def test_a_deadline_that_passes_in_the_queue_frees_the_place(running):
    running.engine.gate.clear()
    first = ask(running, 0)
    await started(running)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(running, 1, timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: waiting(running) == 0)
    running.engine.gate.set()
    await first
    await ask(running, 2)
    assert running.engine.batches == [[0], [2]]


async def test_a_caller_who_leaves_stops_the_engine_and_not_the_next_caller(running):
    running.engine.gate.clear()
    first = ask(running, 0)
    await started(running)
    second = ask(running, 1)
    await until(lambda: waiting(running) == 1)
    first.cancel()
    assert await asyncio.to_thread(running.engine.stopped.wait, 5)
    running.engine.gate.set()
    assert (await second).generations[0].seed == 1


async def test_a_broken_connection_stops_the_engine(running):
    running.engine.gate.clear()

    def start_and_break() -> None:
        with grpc.insecure_channel(running.address) as channel:
            method = "/turbolens.v1.GenerationService/StreamGenerate"
            stream = channel.unary_stream(method, gs.StreamGenerateRequest.SerializeToString)
            call = stream(gs.StreamGenerateRequest(request={"prompt": {"text": ""}}))
            next(call)
            assert running.engine.started.wait(5)

    await asyncio.to_thread(start_and_break)
    assert await asyncio.to_thread(running.engine.stopped.wait, 5)


async def test_positions_are_told_as_the_queue_moves(running):
    running.engine.gate.clear()
    first = ask(running, 0)
    await started(running)
    second = ask(running, 1)
    await until(lambda: waiting(running) == 1)
    call = running.generation.StreamGenerate(gs.StreamGenerateRequest(request={"prompt": {"text": ""}, "seeds": [2]}))
    events = aiter(call)
    assert (await anext(events)).queued.position == 2
    second.cancel()
    assert (await anext(events)).queued.position == 1
    running.engine.gate.set()
    await first
    kinds = [event.WhichOneof("event") async for event in events]
    assert kinds == ["step", "picture", "done"]


async def test_a_caller_who_does_not_read_holds_nobody_up(loading):
    engine = FakeEngine(dataclasses.replace(an_info(), default_size=(512, 512), sizes=((512, 512),)))
    await loading.serving.make_ready(engine)
    request = gs.GenerateRequest(prompt={"text": ""}, seeds=range(16), image={"format": run.IMAGE_FORMAT_RAW})
    call = loading.generation.StreamGenerate(gs.StreamGenerateRequest(request=request))
    await call.read()
    async with grpc.aio.insecure_channel(loading.address) as channel:
        method = "/turbolens.v1.GenerationService/Generate"
        generate = channel.unary_unary(method, gs.GenerateRequest.SerializeToString, gs.GenerateResponse.FromString)
        await generate(gs.GenerateRequest(prompt={"text": ""}, seeds=[1]), timeout=10)
    call.cancel()


async def test_a_failing_engine_is_internal_and_goes_on(running):
    running.engine.fails = RuntimeError("the inside of the engine")
    with pytest.raises(grpc.aio.AioRpcError, match="request id") as caught:
        await ask(running, 0)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "inside" not in caught.value.details()
    running.engine.fails = None
    assert (await ask(running, 1)).generations[0].seed == 1


async def test_searches_are_bounded_too(running):
    running.engine.gate.clear()
    first = ask(running, 0)
    await started(running)
    searches = [running.features.SearchFeatures(fs.SearchFeaturesRequest(query="blue")) for _ in range(5)]
    answers = asyncio.gather(*searches, return_exceptions=True)
    await asyncio.sleep(0.2)
    running.engine.gate.set()
    await first
    codes = [answer.code() for answer in await answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
