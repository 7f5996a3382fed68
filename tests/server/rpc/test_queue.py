"""The queue: order, positions, fullness, leaving it, and callers who read slowly."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import weakref

import grpc
import numpy as np
import pytest
from fake_engine import FakeEngine, an_info
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serve import serve

from tests import messages
from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import run_pb2 as run
from turbolens_server.engine.types import Job, NotFinite, Result
from turbolens_server.rpc.admission import Ledger
from turbolens_server.rpc.callers import Caller
from turbolens_server.rpc.errors import RpcError
from turbolens_server.rpc.queue import Queue, QueueLimits


def ask(running, seed: int, **options) -> asyncio.Future:
    return asyncio.ensure_future(running.generation.Generate(messages.generate(prompt="", seeds=[seed]), **options))


async def started(running) -> None:
    assert await asyncio.to_thread(running.engine.started.wait, 30)


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def waiting(running) -> int:
    return running.serving._readiness.ready.queue.waiting


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
    health = health_pb2_grpc.HealthStub(running.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service="turbolens.v1.GenerationService"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
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
    assert running.engine.batches == [[0], [1, 2], [4]]


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
    assert await asyncio.to_thread(running.engine.stopped.wait, 30)
    running.engine.gate.set()
    assert (await second).generations[0].seed == 1


async def test_steps_of_who_left_are_counted_as_saved_or_wasted(running):
    def counted() -> list[int]:
        steps = running.serving.metrics.steps
        return [int(steps.labels(fate)._value.get()) for fate in ("used", "saved", "wasted")]

    running.engine.gate.clear()
    runs, waits = (
        asyncio.ensure_future(
            running.generation.Generate(messages.generate(prompt="", seeds=[seed], sampling={"steps": 4}))
        )
        for seed in (0, 1)
    )
    await started(running)
    await until(lambda: waiting(running) == 1)
    waits.cancel()
    await until(lambda: counted() == [0, 4, 0])
    runs.cancel()
    await until(lambda: counted() == [0, 8, 0])


async def test_a_broken_connection_stops_the_engine(running):
    running.engine.gate.clear()

    def start_and_break() -> None:
        with grpc.insecure_channel(running.address) as channel:
            method = "/turbolens.v1.GenerationService/StreamGenerate"
            stream = channel.unary_stream(method, gs.StreamGenerateRequest.SerializeToString)
            call = stream(messages.stream_generate(prompt=""))
            next(call)
            assert running.engine.started.wait(30)

    await asyncio.to_thread(start_and_break)
    assert await asyncio.to_thread(running.engine.stopped.wait, 30)


async def test_positions_are_told_as_the_queue_moves(running):
    running.engine.gate.clear()
    first = ask(running, 0)
    await started(running)
    second = ask(running, 1)
    await until(lambda: waiting(running) == 1)
    call = running.generation.StreamGenerate(messages.stream_generate(prompt="", seeds=[2]))
    events = aiter(call)
    assert (await anext(events)).queued.position == 2
    second.cancel()
    assert (await anext(events)).queued.position == 1
    running.engine.gate.set()
    await first
    kinds = [event.WhichOneof("event") async for event in events]
    # The first request may end before its batch does, and be seen to have gone.
    assert [kind for kind in kinds if kind != "queued"] == ["step", "picture", "done"]


@contextlib.asynccontextmanager
async def large_pictures(**settings):
    """A server of 512 x 512 pixels, and stubs to it; its engine counts the pictures that are in memory."""
    engine = FakeEngine(dataclasses.replace(an_info(), default_size=(512, 512), sizes=((512, 512),)))
    alive, draw = weakref.WeakSet(), engine.picture

    def counted(job):
        picture = draw(job).view(Counted)
        alive.add(picture)
        return picture

    engine.picture = counted
    async with serve(engine, **settings) as running:
        yield running.serving, engine, alive, running.generation


class Counted(np.ndarray):
    """A picture that can be in a set."""

    __hash__ = object.__hash__


def unread(stub, seeds: int = 16):
    request = messages.stream_generate(prompt="", seeds=range(seeds), image={"format": run.IMAGE_FORMAT_RAW})
    return stub.StreamGenerate(request)


async def read_all(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_streams_that_nobody_reads_hold_no_more_than_the_limit_and_nobody_up():
    picture_bytes, most = 512 * 512 * 3, 128 * 2**20
    async with large_pictures(max_held_mib=most // 2**20) as (_, engine, alive, stub):
        calls, refused = [], []
        for _ in range(12):
            call = unread(stub)
            try:
                await call.read()
                calls.append(call)
            except grpc.aio.AioRpcError as error:
                refused.append(error)
        async with asyncio.timeout(30):
            while sum(len(batch) for batch in engine.batches) < 16 * len(calls):
                await asyncio.sleep(0.01)
        # Every picture that was made for them is somewhere between the engine and the wire.
        assert len(alive) * picture_bytes <= most
        assert calls
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert "requests hold" in refused[0].details()
        for call in calls:
            call.cancel()
        await until(lambda: not alive)
        await unread(stub).read()


async def test_a_stream_that_nobody_reads_ends_in_time(log_lines):
    async with large_pictures(stalled_s=0.3) as (serving, _, alive, stub):
        call = unread(stub)
        await call.read()
        async with asyncio.timeout(30):
            while not [line for line in log_lines if line["event"] == "rpc"]:
                await asyncio.sleep(0.02)
        assert log_lines[-1]["reason"] == "STREAM_NOT_READ"
        await until(lambda: not alive)
        assert serving._ledger.held < 2**20  # what gRPC still has of it
        with pytest.raises(grpc.aio.AioRpcError, match=r"took nothing for 0\.3 s"):
            await read_all(call)
        await until(lambda: not serving._ledger.held)


async def test_a_stream_that_nobody_reads_does_not_hold_up_the_end():
    async with large_pictures() as (serving, _, alive, stub):
        call = unread(stub)
        await call.read()
        await until(lambda: alive)
        start = asyncio.get_running_loop().time()
        await serving.stop(30)
        assert asyncio.get_running_loop().time() - start < 10
        del call


async def test_a_request_that_can_never_fit_says_so():
    async with large_pictures(max_held_mib=16) as (_, _, _, stub):
        with pytest.raises(grpc.aio.AioRpcError, match=r"needs about 25 MiB .* at most 14 MiB") as caught:
            await stub.Generate(messages.generate(prompt="", seeds=range(16)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_one_caller_leaves_room_for_the_next():
    ledger = Ledger(900)
    with (
        contextlib.closing(ledger.account(Caller("greedy"))) as greedy,
        contextlib.closing(ledger.account(Caller("modest"))) as modest,
    ):
        for _ in range(8):
            greedy.hold_answer(100, 1)
        with pytest.raises(RpcError, match="requests hold"):
            greedy.hold_answer(1, 1)
        modest.hold_answer(10, 1)
    assert ledger.held == 0


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


# Shared batches


def a_job(seed: int, steps: int = 1) -> Job:
    return Job("", seed, steps, 64, 64)


@pytest.fixture
async def queue(fake):
    """A queue on an engine that waits for its gate."""
    made = Queue(fake, QueueLimits(max_batch=4, batch_wait_s=0, max_queue=32, max_queue_pictures=64))
    fake.gate.clear()
    yield made
    fake.gate.set()
    fake.decode_gate.set()
    await made.close()


async def busy(queue, fake, seed: int = 0) -> asyncio.Task:
    """A request that runs until the gate opens."""
    task = asyncio.create_task(queue.run([a_job(seed)]))
    await until(fake.started.is_set)
    return task


async def queued(queue, jobs, **options) -> asyncio.Task:
    """A request that waits."""
    before = queue.waiting
    task = asyncio.create_task(queue.run(jobs, **options))
    await until(lambda: queue.waiting == before + 1)
    return task


async def test_callers_share_a_batch_and_are_told(running):
    running.engine.gate.clear()
    calls = [ask(running, 0)]
    await started(running)
    for seed in (1, 2):
        calls.append(ask(running, seed))
    await until(lambda: waiting(running) == 2)
    running.engine.gate.set()
    answers = await asyncio.gather(*calls)
    assert [answer.generations[0].batch_size for answer in answers] == [1, 2, 2]
    assert [answer.generations[0].seed for answer in answers] == [0, 1, 2]


async def test_other_steps_are_another_batch(queue, fake):
    tasks = [await busy(queue, fake)]
    for seed, steps in ((1, 1), (2, 2), (3, 1)):
        tasks.append(await queued(queue, [a_job(seed, steps)]))
    fake.gate.set()
    await asyncio.gather(*tasks)
    assert fake.batches == [[0], [1, 3], [2]]


async def test_a_large_request_lets_a_small_one_in(queue, fake):
    tasks = [await busy(queue, fake)]
    tasks.append(await queued(queue, [a_job(seed) for seed in range(10, 22)]))
    tasks.append(await queued(queue, [a_job(1)]))
    fake.gate.set()
    _, large, _ = await asyncio.gather(*tasks)
    assert 1 in fake.batches[1]
    assert [result.job for result in large] == list(range(12))


@pytest.mark.parametrize("fails", [False, True])
async def test_who_is_done_does_not_wait_for_those_who_share_the_batch(queue, fake, fails):
    tasks = [await busy(queue, fake), await queued(queue, [a_job(1)]), await queued(queue, [a_job(2)])]
    draw, held = fake.picture, threading.Event()

    def picture(job):
        if job.seed == 2:
            held.wait(60)
            if fails:
                raise RuntimeError("the second picture")
        return draw(job)

    fake.picture = picture
    fake.gate.set()
    try:
        async with asyncio.timeout(30):
            assert [(await task)[0].job for task in tasks[:2]] == [0, 0]
        assert not tasks[2].done()
        assert queue.running_pictures == 2
    finally:
        held.set()
    if fails:
        with pytest.raises(RuntimeError, match="the second picture"):
            await tasks[2]
    else:
        assert len(await tasks[2]) == 1
    assert fake.batches == [[0], [1, 2]]


async def test_a_row_that_leaves_is_nobody_elses_loss(queue, fake):
    first = await busy(queue, fake)
    leaver, stayer = await queued(queue, [a_job(1)]), await queued(queue, [a_job(2)])
    fake.started.clear()
    first.cancel()  # the gate stays closed: the next batch is held at its first step
    await until(fake.started.is_set)
    leaver.cancel()
    fake.gate.set()
    assert (await stayer)[0].batch_size == 2


async def test_a_deadline_that_passed_in_the_queue_costs_nothing(queue, fake):
    first = await busy(queue, fake)
    late = await queued(queue, [a_job(1)], deadline=asyncio.get_running_loop().time() + 0.05)
    alive = await queued(queue, [a_job(2)], deadline=asyncio.get_running_loop().time() + 60)
    await asyncio.sleep(0.06)
    fake.gate.set()
    await asyncio.gather(first, alive)
    with pytest.raises(RpcError) as caught:
        await late
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "EXPIRED_IN_QUEUE")
    assert fake.batches == [[0], [2]]


async def test_pictures_that_wait_are_counted_too(queue, fake):
    first = await busy(queue, fake)
    calls = [await queued(queue, [a_job(seed) for seed in range(16)]) for _ in range(4)]
    with pytest.raises(RpcError, match="4 requests with 64 pictures") as caught:
        await queue.run([a_job(1)])
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    for call in calls:
        call.cancel()
    await until(lambda: queue.waiting == 0)
    fake.gate.set()
    await first


async def test_the_time_to_come_back_is_that_of_what_waits(queue, fake):
    fake.gate.set()
    await queue.run([a_job(0)])
    await until(lambda: queue._batcher._lane_s)  # its batch ends after it
    queue._batcher._lane_s = dict.fromkeys(queue._batcher._lane_s, 0.5)
    fake.gate.clear()
    fake.started.clear()
    first = await busy(queue, fake)
    waits = await queued(queue, [a_job(seed) for seed in range(64)])
    with pytest.raises(RpcError) as caught:
        await queue.run([a_job(1)])
    assert caught.value.retry_after_s == pytest.approx(65 * 0.5)
    waits.cancel()
    fake.gate.set()
    await first


async def test_a_row_that_is_not_finite_fails_alone(running):
    running.engine.not_finite = {1}
    running.engine.gate.clear()
    calls = [ask(running, 0)]
    await started(running)
    calls += [ask(running, seed) for seed in (1, 2)]
    await until(lambda: waiting(running) == 2)
    running.engine.gate.set()
    _, bad, mate = await asyncio.gather(*calls, return_exceptions=True)
    assert bad.code() is grpc.StatusCode.INTERNAL
    assert "picture 0 (seed 1): the U-Net at step 0 gave values that are not finite in float32" in bad.details()
    info = error_details_pb2.ErrorInfo()
    trailing = dict(bad.trailing_metadata())
    details = status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).details
    assert any(detail.Unpack(info) for detail in details)
    assert (info.reason, info.metadata["request_id"]) == ("NON_FINITE", trailing["x-request-id"])
    assert mate.generations[0].batch_size == 2


async def test_a_stream_gives_the_pictures_that_came_out_and_then_the_error(running):
    running.engine.not_finite = {1}
    request = messages.stream_generate(prompt="", seeds=[1, 2])
    pictures = []

    async def read() -> None:
        async for event in running.generation.StreamGenerate(request):
            if event.WhichOneof("event") == "picture":
                pictures.append(event.picture.generation.seed)

    with pytest.raises(grpc.aio.AioRpcError, match="seed 1"):
        await read()
    assert pictures == [2]


async def test_a_pipelined_engine_denoises_while_it_decodes_and_no_further(fake):
    queue = Queue(fake, QueueLimits(max_batch=1, batch_wait_s=0), pipelined=True)
    fake.decode_gate.clear()
    tasks = [asyncio.create_task(queue.run([a_job(seed)])) for seed in range(3)]
    await until(lambda: len(fake.batches) == 2)
    await asyncio.sleep(0.1)
    assert fake.batches == [[0], [1]]  # one decodes, one waits for it; the third can still gain mates
    assert queue.waiting == 1
    fake.decode_gate.set()
    results = await asyncio.gather(*tasks)
    assert [result.latents[0, 0, 0] for (result,) in results] == [0, 1, 2]
    assert len(fake.threads) == 2
    await queue.close()


async def test_after_a_shared_batch_the_next_one_waits_a_little(fake):
    queue = Queue(fake, QueueLimits(max_batch=4, batch_wait_s=0.3))
    fake.gate.clear()
    tasks = [await busy(queue, fake)]
    tasks += [await queued(queue, [a_job(1)]), await queued(queue, [a_job(2)])]
    fake.gate.set()
    await asyncio.gather(*tasks)
    start = asyncio.get_running_loop().time()
    await queue.run([a_job(3)])
    assert asyncio.get_running_loop().time() - start > 0.2
    await asyncio.gather(queue.run([a_job(4)]), queue.run([a_job(5)]))
    assert fake.batches[2:] in ([[3], [4, 5]], [[3], [4], [5]])
    await queue.close()


async def test_events_of_a_shared_batch_reach_their_own_caller(queue, fake):
    fake.not_finite = {12}
    tasks = [await busy(queue, fake)]
    other = asyncio.create_task(events_of(queue, [a_job(11), a_job(12)]))
    await until(lambda: queue.waiting == 1)
    tasks.append(await queued(queue, [a_job(21)]))
    fake.gate.set()
    await asyncio.gather(*tasks)
    events = [event for event in await other if isinstance(event, Result | NotFinite)]
    assert sorted((event.job, type(event).__name__) for event in events) == [(0, "Result"), (1, "NotFinite")]


async def events_of(queue, jobs) -> list:
    return [event async for event in queue.stream(jobs)]
