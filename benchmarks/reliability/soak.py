"""Mixed callers for a long time: memory, descriptors and latency must stay flat.

python -m benchmarks.reliability.soak --minutes 20
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any

import numpy as np
import tyro

import turbolens as tl
from benchmarks.reliability.results import ms, save, say
from benchmarks.reliability.servers import Server, started

_EVERY_S = 10.0
PROMPT = "a big red star on the left, night background"


async def caller(target: str, number: int, end: float, took: list[float], failed: list[str]) -> None:
    """One call after another, of all kinds; a fifth is cancelled half-way, and now and then it connects anew."""
    draw = random.Random(number)
    while time.monotonic() < end:
        async with tl.aio.connect(target) as lens:
            for _ in range(200):
                if time.monotonic() > end:
                    return
                seed, start = draw.randrange(2**31), time.perf_counter()
                kind = draw.choice(("picture", "picture", "features", "stream", "search", "left"))
                try:
                    if kind == "picture":
                        await lens.generate(PROMPT, seed=seed)
                        took.append(time.perf_counter() - start)
                    elif kind == "features":
                        await lens.extract(PROMPT, seed=seed)
                    elif kind == "stream":
                        async for _event in lens.stream_generate(PROMPT, seed=seed, steps=2):
                            pass
                    elif kind == "search":
                        await lens.search_features("star")
                    else:
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(lens.generate(PROMPT, seed=seed, steps=4), 0.02)
                except tl.TurboLensError as error:
                    failed.append(f"{kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(draw.uniform(0.0, 0.4))


async def watch(server: Server, end: float, took: list[float]) -> list[dict[str, float]]:
    """Memory, descriptors and latency over time."""
    seen: list[dict[str, float]] = []
    start = time.monotonic()
    while time.monotonic() < end:
        before = len(took)
        await asyncio.sleep(_EVERY_S)
        memory, open_files = server.memory_mib(), server.descriptors()
        at = round(time.monotonic() - start, 1)
        seen.append(
            {"at": at, "memory_mib": round(memory, 1), "descriptors": open_files, "p50_ms": ms(took[before:], 0.5)}
        )
        if len(seen) % 6 == 0:
            say(f"{at:.0f} s: {memory:.0f} MiB, {open_files} descriptors, {len(took)} pictures")
    return seen


async def run(server: Server, minutes: float, callers: int) -> dict[str, Any]:
    """Call for so long."""
    end = time.monotonic() + 60 * minutes
    took: list[float] = []
    failed: list[str] = []
    watching = asyncio.create_task(watch(server, end, took))
    await asyncio.gather(*(caller(server.target, number, end, took, failed) for number in range(callers)))
    seen = await watching
    # The first tenth fills caches of prompts and the allocator's pools.
    settled = seen[len(seen) // 10 :]
    minutes_of = np.array([one["at"] / 60 for one in settled])
    slope = float(np.polyfit(minutes_of, [one["memory_mib"] for one in settled], 1)[0])
    third = len(settled) // 3
    early, late = ([one["p50_ms"] for one in part] for part in (settled[:third], settled[-third:]))
    return {
        "minutes": minutes,
        "callers": callers,
        "pictures": len(took),
        "failed": len(failed),
        "memory_mib_per_minute": round(slope, 3),
        "memory_mib_first_and_last": [settled[0]["memory_mib"], settled[-1]["memory_mib"]],
        "descriptors_most": max(one["descriptors"] for one in seen),
        "descriptors_last": seen[-1]["descriptors"],
        "p50_ms_first_and_last_third": [float(np.nanmedian(early)), float(np.nanmedian(late))],
        "failures": failed[:20],
        "watched": seen,
    }


def main(minutes: float = 20.0, callers: int = 4) -> None:
    """Soak.

    Args:
        minutes: how long.
        callers: who call at once.
    """
    with started() as server:
        result = asyncio.run(run(server, minutes, callers))
    save("soak", result)
    if result["failed"]:
        raise SystemExit(f"{result['failed']} calls failed: {result['failures'][0]}")


if __name__ == "__main__":
    tyro.cli(main)
