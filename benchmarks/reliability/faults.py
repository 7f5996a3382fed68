"""Servers that are told to stop or are killed under load, and repeated requests.

python -m benchmarks.reliability.faults
"""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any, Final

import tyro

import turbolens as tl
from benchmarks.reliability.load import PROMPT, Caller, request
from benchmarks.reliability.results import save, say
from benchmarks.reliability.servers import Server, started

_METRICS_PORT: Final = 52091


async def told_to_stop(server: Server, callers: int) -> dict[str, Any]:
    """SIGTERM while calls run and wait: each is answered, or told at once to go elsewhere."""
    async with Caller(server.target) as warm:
        await warm.call(request([0], 4))
    asked = asyncio.Event()

    async def one(caller: Caller, number: int) -> None:
        for turn in range(1000):
            await caller.call(request([1000 * number + turn], 4))
            if asked.is_set():
                return

    every = [Caller(server.target) for _ in range(callers)]
    calls = [asyncio.create_task(one(caller, number)) for number, caller in enumerate(every)]
    await asyncio.sleep(3.0)
    start = time.monotonic()
    server.send(signal.SIGTERM)
    asked.set()
    await asyncio.gather(*calls)
    code = await asyncio.to_thread(server.process.wait, 60)
    took = time.monotonic() - start
    for caller in every:
        await caller.__aexit__()
    codes = sum((caller.seen.codes for caller in every), start=type(every[0].seen.codes)())
    refused = sum("STOPPING" in line for line in server.log)
    return {
        "callers": callers,
        "codes": dict(codes),
        "refused_as_stopping": refused,
        "accepted_and_lost": codes.total() - codes["OK"] - refused,
        "exit_code": code,
        "seconds_to_end": round(took, 2),
    }


async def one_of_two_killed(first: Server, second: Server, callers: int, seconds: float) -> dict[str, Any]:
    """`kill -9` of one of two servers, under the SDK's calls."""
    done, failed = 0, []
    end = time.monotonic() + seconds
    targets = f"{first.target},{second.target}"

    async def one(lens: tl.aio.AsyncLens, number: int) -> None:
        nonlocal done
        turn = 0
        while time.monotonic() < end:
            turn += 1
            try:
                await lens.generate(PROMPT, seed=1000 * number + turn, steps=2, timeout=60)
                done += 1
            except tl.TurboLensError as error:
                failed.append(f"{type(error).__name__}: {error}")

    async with tl.aio.connect(targets) as lens:
        calls = [asyncio.create_task(one(lens, number)) for number in range(callers)]
        await asyncio.sleep(seconds / 2)
        before = done
        first.send(signal.SIGKILL)
        await asyncio.gather(*calls)
    return {"callers": callers, "calls": done, "before_the_kill": before, "failed": len(failed), "failures": failed[:5]}


async def repeated(server: Server, requests: int) -> dict[str, Any]:
    """Each request sent three times under one id, two of them while the first one runs."""
    made = 'turbolens_unet_steps_total{fate="used"}'
    async with Caller(server.target) as caller:
        await caller.call(request([0]))
        before = server.metric(made)
        same = 0
        for number in range(requests):
            asked = request([number])
            asked.request_id = f"repeated-{number}"
            first, again = await asyncio.gather(caller.call(asked), caller.call(asked))
            later = await caller.call(asked)
            answers = {None if one is None else one.SerializeToString() for one in (first, again, later)}
            same += len(answers) == 1 and None not in answers
        steps = int(server.metric(made) - before)
    return {"requests": requests, "sent": 3 * requests, "pictures_made": steps, "answers_alike": same}


def main(callers: int = 12, seconds: float = 20.0) -> None:
    """Fail.

    Args:
        callers: who call at once.
        seconds: of calls to two servers.
    """
    with started() as server:
        say("SIGTERM under load")
        save("stopping", asyncio.run(told_to_stop(server, callers)))
    with started() as first, started() as second:
        say("kill -9 of one of two")
        save("killed", asyncio.run(one_of_two_killed(first, second, callers, seconds)))
    with started(metrics_port=_METRICS_PORT) as server:
        say("repeated requests")
        save("repeated", asyncio.run(repeated(server, 50)))


if __name__ == "__main__":
    tyro.cli(main)
