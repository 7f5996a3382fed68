"""Real servers under the load that was simulated: the same arrivals, call by call, sent by the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import turbolens as tl
from benchmarks.fleet.simulation import Curve, Fleet, Outcome, Request, poisson, simulate

Batches = list[tuple[int, float, float]]
"""Size and seconds of both stages of each."""


@contextlib.contextmanager
def timed_servers(count: int, curve: Curve, max_batch: int) -> Iterator[tuple[str, Batches]]:
    """So many processes; yields the target of all of them, and what their batches took, which is filled at the end."""
    took: Batches = []
    command = [sys.executable, "-m", "benchmarks.fleet.timed_server"]
    command += ["--curve", json.dumps(dataclasses.asdict(curve)), "--max-batch", str(max_batch)]
    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(count):
            server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(_end, server, took)
            servers.append(server)
        ports = [int(server.stdout.readline()) for server in servers if server.stdout is not None]
        yield "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports), took


def _end(server: subprocess.Popen[str], took: Batches) -> None:
    told, _ = server.communicate("", timeout=30)
    took += json.loads(told.splitlines()[-1])


def measured(took: Batches, curve: Curve) -> Curve:
    """The curve that the batches came to; where a size was never run, straight between its neighbours."""
    sizes = sorted({size for size, _, _ in took})
    stages = [[float(np.mean([one[stage] for one in took if one[0] == size])) for size in sizes] for stage in (1, 2)]
    return Curve(tuple(sizes), tuple(stages[0]), tuple(stages[1]), curve.pipelined)


async def send(target: str, arrivals: Sequence[Request]) -> tuple[npt.NDArray[np.float64], int]:
    """Every call at its time, whatever has become of those before it; their seconds, and how many failed."""
    latencies: list[float] = []
    failed = 0
    async with tl.aio.connect(target) as lens:
        await asyncio.gather(*(lens.generate("", seed=0, format="raw") for _ in range(8)))  # connects to all
        start = time.perf_counter() + 0.5

        async def call(request: Request) -> None:
            nonlocal failed
            await asyncio.sleep(start + request.arrived - time.perf_counter())
            due = start + request.arrived
            try:
                await lens.generate("", seeds=range(request.pictures), format="raw")
            except tl.TurboLensError:
                failed += 1
            else:
                latencies.append(time.perf_counter() - due)

        await asyncio.gather(*map(call, arrivals))
    return np.array(latencies), failed


async def overhead(target: str, curve: Curve, calls: int = 40) -> float:
    """What a call to an idle server takes beyond the engine's time; the median, in seconds."""
    took = []
    async with tl.aio.connect(target) as lens:
        for _ in range(calls):
            start = time.perf_counter()
            await lens.generate("", seed=0, format="raw")
            took.append(time.perf_counter() - start)
    return float(np.median(took[5:])) - sum(curve.stages(1))


def case(servers: int, rate: float, seconds: float, curve: Curve, max_batch: int = 8, seed: int = 0) -> dict[str, Any]:
    """One fleet, real and simulated, under the same arrivals."""
    with timed_servers(servers, curve, max_batch) as (target, took):
        extra = asyncio.run(overhead(target, curve))
        real, failed = asyncio.run(send(target, poisson(rate, seconds, seed)))
    fleet = Fleet(measured(took, curve), servers, "round robin", max_batch, overhead_s=extra)
    told: Outcome = simulate(fleet, poisson(rate, seconds, seed))
    rows = {
        f"p{q}": {"real_s": float(np.quantile(real, q / 100)), "simulated_s": told.quantile(q / 100)}
        for q in (50, 90, 99)
    }
    return {
        "label": {"servers": servers, "calls a second": rate, "busy": round(told.busy, 2)},
        "calls": len(real),
        "failed": failed,
        "refused_in_simulation": told.refused,
        "overhead_s": extra,
        "mean_batch": told.mean_batch,
        "quantiles": rows,
        "real_s": np.sort(real).round(5).tolist()[:: max(1, len(real) // 120)],
        "simulated_s": np.sort(told.latencies_s).round(5).tolist()[:: max(1, len(told.latencies_s) // 120)],
    }
