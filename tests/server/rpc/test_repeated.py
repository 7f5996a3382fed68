"""A request that is repeated under its own id costs nothing again."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests import messages


def ask(running, request_id="mine", seeds=(1,), prompt="a star"):
    return running.generation.Generate(messages.generate(prompt=prompt, seeds=seeds, request_id=request_id))


def pictures_made(running) -> int:
    return sum(len(batch) for batch in running.engine.batches)


async def test_a_repeated_request_gets_the_same_answer(running):
    first = await running.generation.Generate(messages.generate(prompt="a star", request_id="mine"))  # a drawn seed
    again = await running.generation.Generate(messages.generate(prompt="a star", request_id="mine"))
    assert again == first
    assert pictures_made(running) == 1


async def test_it_joins_the_first_one_while_that_runs(running, log_lines):
    running.engine.gate.clear()
    calls = [ask(running) for _ in range(5)]
    answers = asyncio.gather(*calls)
    await asyncio.sleep(0.3)
    running.engine.gate.set()
    assert len({answer.generations[0].image.data for answer in await answers}) == 1
    assert pictures_made(running) == 1
    assert [line["pictures"] for line in log_lines if line["event"] == "rpc"] == [1] * 5


@pytest.mark.parametrize("other", [{"request_id": "other"}, {"request_id": ""}, {"seeds": (2,)}, {"prompt": "x"}])
async def test_anything_else_is_another_request(running, other):
    await ask(running)
    await ask(running, **other)
    assert pictures_made(running) == 2


async def test_the_first_one_may_leave_without_taking_the_others_along(running):
    running.engine.gate.clear()
    first, second = ask(running), ask(running)
    second = asyncio.ensure_future(second)
    assert await asyncio.to_thread(running.engine.started.wait, 30)
    await asyncio.sleep(0.1)
    first.cancel()
    await asyncio.sleep(0.1)
    running.engine.gate.set()
    assert (await second).generations
    assert pictures_made(running) == 1


async def test_when_all_have_left_the_engine_stops_and_the_next_one_begins_anew(running):
    running.engine.gate.clear()
    calls = [ask(running), ask(running)]
    assert await asyncio.to_thread(running.engine.started.wait, 30)
    await asyncio.sleep(0.1)
    for call in calls:
        call.cancel()
    assert await asyncio.to_thread(running.engine.stopped.wait, 30)
    running.engine.gate.set()
    assert (await ask(running)).generations


async def test_an_error_is_not_kept(running):
    running.engine.fails = RuntimeError("boom")
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(running)
    running.engine.fails = None
    assert (await ask(running)).generations
