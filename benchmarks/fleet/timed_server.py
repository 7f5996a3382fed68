"""A real server whose engine takes a known time: it sleeps as long as a curve says, and answers with one picture.

    python -m benchmarks.fleet.timed_server --curve '{"sizes": [1, 8], "denoise_s": [0.1, 0.4], "decode_s": [0, 0]}'

All else is the program: socket, checks, queue, batches, coding. So that many of them on a small machine are not slower
than one, which with real work they would be.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from benchmarks.fleet.simulation import Curve
from turbolens_server.config import ServerConfig
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job, Result
from turbolens_server.serving import Serving, keep_what_is_loaded, load_from


class TimedEngine:
    """An engine that has made one picture, and from then on only takes its time."""

    def __init__(self, engine: Engine, curve: Curve) -> None:
        height, width = engine.info.default_size
        (made,) = engine.run([Job("", 0, 1, height, width)])
        assert made is not None
        self._engine, self._curve, self._made = engine, curve, made
        self.pipelined = curve.pipelined
        self.took: list[tuple[int, float, float]] = []
        """Size and seconds of the stages of each batch, as they were: a machine that is busy wakes sleepers late."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def denoise(self, jobs: Sequence[Job], **_: Any) -> tuple[Sequence[Job], float]:
        """As long as the curve says."""
        start = time.perf_counter()
        time.sleep(self._curve.stages(len(jobs))[0])
        return jobs, time.perf_counter() - start

    def decode(self, denoised: tuple[Sequence[Job], float], *, on_event: Callable[[Result], None], **_: Any) -> None:
        """Likewise; then everybody's answer, which is the same but for what attributes."""
        jobs, denoise_s = denoised
        start = time.perf_counter()
        time.sleep(self._curve.stages(len(jobs))[1])
        self.took.append((len(jobs), denoise_s, time.perf_counter() - start))
        for row, job in enumerate(jobs):
            made = self._made if job.attribute is None else self._engine.run([job])[0]  # of whose answer it is all
            assert made is not None
            on_event(dataclasses.replace(made, job=row, batch_size=len(jobs)))


async def serve(curve: Curve, config: ServerConfig) -> None:
    """Serve until the input ends; the first line printed is the port, the last what each batch took."""
    engine = TimedEngine(load_from(config), curve)
    serving = Serving(config)
    port = await serving.start("127.0.0.1:0")
    await serving.make_ready(engine)  # type: ignore[arg-type]
    keep_what_is_loaded()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await serving.stop(0)
    print(json.dumps(engine.took))


def main(curve: str, max_batch: int = 8, batch_wait_ms: float = 5.0, settings: str = "{}") -> None:
    """Serve.

    Args:
        curve: the fields of `Curve`, as JSON.
        max_batch: as for `turbolens serve`.
        batch_wait_ms: as for `turbolens serve`.
        settings: others of the server, as JSON.
    """
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(curve).items()
    }
    config = ServerConfig(
        **{"max_batch": max_batch, "batch_wait_ms": batch_wait_ms, "warm_up": False, **json.loads(settings)}
    )
    asyncio.run(serve(Curve(**fields), config))


if __name__ == "__main__":
    tyro.cli(main)
