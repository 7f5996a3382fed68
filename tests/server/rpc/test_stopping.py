"""How a server ends while there is work."""

from __future__ import annotations

import asyncio

import grpc
from serve import serve

from tests import messages


def ask(running, seed: int, count: int = 4):
    return asyncio.ensure_future(running.generation.Generate(messages.generate(prompt="", seeds=[seed] * count)))


async def busy(running, requests: int, seconds_each: float):
    """Requests that wait behind one that runs, each a batch that takes so long by the queue's own measure."""
    queue = running.serving._readiness.ready.queue
    await ask(running, 0)
    (key,) = queue._batcher._lane_s
    queue._batcher._lane_s[key] = seconds_each / 4
    running.engine.started.clear()
    running.engine.gate.clear()
    calls = [ask(running, 1)]
    assert await asyncio.to_thread(running.engine.started.wait, 30)
    for seed in range(2, requests + 1):
        calls.append(ask(running, seed))
        await asyncio.sleep(0.02)
    return calls


async def test_what_can_be_finished_is_and_the_rest_is_told_at_once_to_go_elsewhere(fake, log_lines):
    async with serve(fake, max_batch=4, grace_s=100) as running:
        calls = await busy(running, requests=8, seconds_each=10)
        stopping = asyncio.create_task(running.serving.stop(50))
        refused = await asyncio.gather(*calls[4:], return_exceptions=True)  # while the engine still stands
        assert {error.code() for error in refused} == {grpc.StatusCode.UNAVAILABLE}
        assert all(dict(error.trailing_metadata())["grpc-retry-pushback-ms"] for error in refused)
        (line,) = [line for line in log_lines if line["event"] == "refused"]
        assert line["requests"] == 4
        fake.gate.set()
        answers = await asyncio.gather(*calls[:4])
        assert [answer.generations[0].seed for answer in answers] == [1, 2, 3, 4]
        assert fake.batches[1:] == [[seed] * 4 for seed in (1, 2, 3, 4)]  # one after the other
        await stopping


async def test_what_outlasts_the_grace_is_told_to_go_elsewhere(fake, log_lines):
    async with serve(fake, max_batch=4, grace_s=100) as running:
        calls = await busy(running, requests=3, seconds_each=0.01)  # which they then do not keep to
        await asyncio.wait_for(running.serving.stop(0.5), 30)
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is stopping")
            assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
    (line,) = [line for line in log_lines if line["event"] == "cut off"]
    assert line["requests"] == 3


async def test_no_more_is_let_in_than_a_stop_can_finish(fake):
    async with serve(fake, max_batch=4, grace_s=50) as running:
        calls = await busy(running, requests=4, seconds_each=10)
        try:
            await ask(running, 5)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "40 s of work wait" in error.details()
        else:
            raise AssertionError("it was let in")
        stopping = asyncio.create_task(running.serving.stop(50))
        await asyncio.sleep(0.1)
        fake.gate.set()
        assert len(await asyncio.gather(*calls)) == 4
        await stopping


async def test_the_first_callers_of_all_are_counted_by_the_warm_up(fake):
    fake.warm_up_s = 0.99
    fake.gate.clear()
    async with serve(fake, max_batch=4, grace_s=50) as running:
        calls = [ask(running, seed) for seed in range(12)]  # of 4 s each, of which 40 s may wait and run
        done, _ = await asyncio.wait(calls, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0.2)
        refused = [call for call in calls if call.done()]
        assert done
        assert len(refused) == 2
        assert {call.exception().code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        stopping = asyncio.create_task(running.serving.stop(50))
        await asyncio.sleep(0.1)
        fake.gate.set()
        assert len(await asyncio.gather(*(call for call in calls if call not in refused))) == 10
        await stopping


async def test_who_leaves_does_not_teach_that_jobs_are_short(fake):
    fake.warm_up_s = 0.99
    fake.gate.clear()
    async with serve(fake, max_batch=4, grace_s=50) as running:
        left = ask(running, 0)
        assert await asyncio.to_thread(fake.started.wait, 30)
        left.cancel()
        assert await asyncio.to_thread(fake.stopped.wait, 30)
        calls = [ask(running, seed) for seed in range(1, 13)]  # of 4 s each, of which 40 s may wait and run
        await asyncio.wait(calls, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0.2)
        assert len([call for call in calls if call.done()]) == 2
        fake.gate.set()
        await asyncio.gather(*calls, return_exceptions=True)
