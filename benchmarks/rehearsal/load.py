"""Callers with the SDK: a line of JSON for each call on the output, until the input ends.

Every line of the input is a new rate, in calls a second.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

import tyro

import turbolens as tl


async def run(target: str, rate: float, ca: str, token: str, timeout: float) -> None:
    """Send calls at their times, whatever has become of those before."""
    options: dict[str, object] = {}
    if ca:
        with open(ca, "rb") as file:
            options["tls"] = tl.TLS(file.read())
    if token:
        options["token"] = token
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    draw = random.Random(0)
    calls: set[asyncio.Task[None]] = set()
    async with tl.aio.connect(target, **options) as lens:  # type: ignore[arg-type]

        async def call(seed: int) -> None:
            start, error = time.time(), None
            try:
                await lens.generate("a big red star on the left, night background", seed=seed, timeout=timeout)
            except tl.TurboLensError as failed:
                error = f"{type(failed).__name__}: {failed}"
            print(json.dumps({"at": start, "s": round(time.time() - start, 4), "error": error}), flush=True)

        line = asyncio.create_task(reader.readline())
        seed = 0
        while True:
            await asyncio.wait({line}, timeout=draw.expovariate(rate))
            if line.done():
                if not (text := line.result()):
                    break
                rate = float(text)
                line = asyncio.create_task(reader.readline())
                continue
            seed += 1
            calls.add(task := asyncio.create_task(call(seed)))
            task.add_done_callback(calls.discard)
        await asyncio.gather(*calls)


def main(target: str, rate: float = 2.0, ca: str = "", token: str = "", timeout: float = 60.0) -> None:
    """Call.

    Args:
        target: as for `tl.connect`.
        rate: calls a second, at first.
        ca: file of who signed the server's certificate; empty: in the clear.
        token: the callers'.
        timeout: seconds of a call.
    """
    asyncio.run(run(target, rate, ca, token, timeout))


if __name__ == "__main__":
    tyro.cli(main)
