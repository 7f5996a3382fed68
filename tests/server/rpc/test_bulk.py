"""Very many runs over one stream: full batches, errors of items, a bounded number held, and callers who leave."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from serve import serve

from tests import messages
from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_server.rpc import bulk
from turbolens_server.rpc.admission import Ledger
from turbolens_server.rpc.callers import Caller


def an_item(number: int, **fields) -> fs.ExtractFeaturesBatchRequest:
    fields = {"prompt": "", "seeds": [number], **fields}
    return fs.ExtractFeaturesBatchRequest(item=number, request=messages.extract(**fields))


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_items_run_in_full_batches_and_each_is_answered_as_a_call_of_its_own(fake):
    denoise = fake.denoise

    def slowly(jobs, **hooks):
        time.sleep(0.1)
        return denoise(jobs, **hooks)

    fake.denoise = slowly
    async with serve(fake, max_batch=4) as running:
        call = running.features.ExtractFeaturesBatch(an_item(i) for i in range(40))
        answers = {answer.item: answer.response async for answer in call}
        alone = await running.features.ExtractFeatures(an_item(7).request)
        assert sorted(answers) == list(range(40))
        assert answers[7].extractions[0].features == alone.extractions[0].features
        assert answers[7].provenance == alone.provenance
        sizes = [len(batch) for batch in fake.batches[:-1]]
        assert sum(sizes) == 40
        assert len(sizes) <= 13  # one alone, then full ones but for where reading lags


async def test_a_bad_item_is_an_answer_and_the_stream_goes_on(fake):
    fake.not_finite = {2}
    items = [an_item(0), an_item(1, sampling={"steps": 99}), an_item(2), an_item(3, prompt="x" * 9000), an_item(4)]
    items.insert(2, fs.ExtractFeaturesBatchRequest(item=9))
    async with serve(fake) as running:
        answers = {answer.item: answer async for answer in running.features.ExtractFeaturesBatch(iter(items))}
    assert {i for i, answer in answers.items() if answer.HasField("response")} == {0, 4}
    assert answers[1].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert answers[1].error.violations[0].field == "run.sampling.steps"
    assert answers[9].error.violations[0].field == "run.source"
    assert (answers[2].error.reason, answers[2].error.code) == ("NON_FINITE", grpc.StatusCode.INTERNAL.value[0])


async def test_several_prompts_of_an_item_are_counted_as_so_many_runs(fake):
    item = an_item(0, seeds=[1, 2], more_prompts=["a", "b"])
    assert bulk._lanes(item) == 6
    async with serve(fake) as running:
        (answer,) = [answer async for answer in running.features.ExtractFeaturesBatch(iter([item]))]
    told = [(one.prompt_index, one.seed) for one in answer.response.extractions]
    assert told == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]


async def test_others_share_the_batches_and_find_half_of_the_queue_free(fake):
    fake.gate.clear()
    async with serve(fake, max_batch=4, max_queue=64) as running:
        call = running.features.ExtractFeaturesBatch(an_item(i) for i in range(60))
        queue = running.serving._readiness.ready.queue
        await until(lambda: queue.waiting == bulk.window(queue.limits) - 1)  # the first runs alone
        other = asyncio.ensure_future(running.generation.Generate(messages.generate(prompt="", seeds=[999])))
        await until(lambda: queue.waiting == bulk.window(queue.limits))
        await asyncio.sleep(0.2)
        assert queue.waiting == bulk.window(queue.limits)
        fake.gate.set()
        await other
        assert len(next(batch for batch in fake.batches if 999 in batch)) > 1
        assert sorted([answer.item async for answer in call]) == list(range(60))
        assert running.serving._ledger.held == 0


@pytest.mark.parametrize("slow", ["engine", "reader"])
async def test_no_more_is_read_than_the_window_holds(slow):
    ledger, gate, read = Ledger(2**20), asyncio.Event(), []

    async def arrivals():
        for i in range(100):
            read.append(i)
            yield an_item(i), ledger.account(Caller("someone"))

    async def run(item, account):
        account.hold_answer(10, 1)
        if slow == "engine":
            await gate.wait()
        return fs.ExtractFeaturesBatchResponse(item=item.item)

    answers = bulk.answer_all(arrivals(), run, 8)
    first = asyncio.ensure_future(anext(answers))
    await asyncio.sleep(0.05)
    assert len(read) == 8
    assert ledger.held == 80
    gate.set()
    got = [(await first).item]
    await asyncio.sleep(0.05)
    assert len(read) == 8  # until the answer is taken, which asking for the next one says
    async for answer in answers:
        got.append(answer.item)
        assert len(read) <= len(got) + 8
    assert got == list(range(100))
    assert ledger.held == 0


async def test_a_caller_who_leaves_ends_all_its_items_at_once(fake):
    fake.gate.clear()
    async with serve(fake, max_batch=4) as running:
        call = running.features.ExtractFeaturesBatch(an_item(i) for i in range(100))
        queue = running.serving._readiness.ready.queue
        await until(lambda: queue.waiting)
        call.cancel()
        await until(lambda: not queue.waiting and not running.serving._ledger.held)
        assert await asyncio.to_thread(fake.stopped.wait, 30)
        assert len(fake.batches) == 1


async def test_where_the_queue_is_full_items_wait_their_turn(fake):
    fake.gate.clear()
    async with serve(fake, max_batch=1, max_queue=2) as running:
        others = [asyncio.ensure_future(running.generation.Generate(messages.generate(prompt=""))) for _ in range(3)]
        await until(lambda: running.serving._readiness.ready.queue.waiting == 2)
        call = running.features.ExtractFeaturesBatch(an_item(i) for i in range(3))
        await asyncio.sleep(0.1)
        fake.gate.set()
        answers = [answer async for answer in call]
        assert sorted(answer.item for answer in answers if answer.HasField("response")) == [0, 1, 2]
        await asyncio.gather(*others)


async def test_a_server_that_stops_answers_what_it_holds_and_says_so(fake):
    fake.gate.clear()
    async with serve(fake, max_batch=4) as running:

        async def items():
            for i in range(2):
                yield an_item(i)
            await asyncio.sleep(60)

        call = running.features.ExtractFeaturesBatch(items())
        await until(lambda: running.serving._readiness.ready.queue.waiting == 1)
        stopping = asyncio.ensure_future(running.serving.stop(10))
        await asyncio.sleep(0.1)
        fake.gate.set()
        got = []

        async def read():
            async for answer in call:
                got.append(answer.item)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read()
        assert sorted(got) == [0, 1]
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await stopping
