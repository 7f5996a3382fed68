"""One page's runs: for each of its purposes at most one runs and one waits, and the newest wins."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from typing import Any, Final

from starlette.websockets import WebSocket, WebSocketDisconnect

import turbolens as tl
from turbolens_studio.connection import Connection
from turbolens_studio.features import Atlas
from turbolens_studio.wire import BadRun, Run, error_json, pack, packed_features
from turbolens_studio.workshop import Made, Workshop

_MAX_RUNS: Final = 256
"""Of one message: a sweep."""
_AT_ONCE: Final = 4
"""Runs of a sweep that the server has at a time: enough to fill batches, few enough to let others in between."""
log = logging.getLogger("turbolens.studio")


@dataclasses.dataclass(frozen=True)
class Job:
    """What a page asks for at once: one run, or the many of a sweep."""

    rev: int
    """The page's own count; every answer repeats it."""
    runs: tuple[Run, ...]
    received: float


class Lane:
    """The runs for one purpose, such as painting."""

    def __init__(self, name: str, session: Session) -> None:
        self._name = name
        self._session = session
        self._task: asyncio.Task[None] | None = None
        self._rev = -1
        self._waiting_in_line = False
        self._pending: Job | None = None

    def offer(self, job: Job) -> None:
        """Run this next, in place of whatever waits. A sweep, or what the server has not begun, ends for it."""
        self._pending = job
        if self._task is None:
            self._next()
        elif self._waiting_in_line:
            self._task.cancel()

    def cancel(self) -> None:
        """End what runs and what waits, and say so of both."""
        if self._pending is not None:
            self._session.tell(self._cancelled(self._pending.rev))
            self._pending = None
        if self._task is not None:
            self._task.cancel()

    def _next(self) -> None:
        job, self._pending = self._pending, None
        if job is None:
            self._task = None
            return
        self._rev, self._waiting_in_line = job.rev, len(job.runs) > 1
        self._task = asyncio.create_task(self._run(job))
        self._task.add_done_callback(lambda task: self._over(task, job.rev))

    def _over(self, task: asyncio.Task[None], rev: int) -> None:
        if task.cancelled():  # before its first step; later `_run` says it
            self._session.tell(self._cancelled(rev))
        self._next()

    def _cancelled(self, rev: int) -> dict[str, Any]:
        return {"kind": "cancelled", "lane": self._name, "rev": rev}

    async def _run(self, job: Job) -> None:
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(index: int, run: Run) -> None:
            async with room:
                await self._make(job, index, run)

        try:
            async with asyncio.TaskGroup() as group:
                for index, run in enumerate(job.runs):
                    group.create_task(one(index, run))
            await self._send(job.rev, {"kind": "done"})
        except asyncio.CancelledError:
            await asyncio.shield(self._send(job.rev, {"kind": "cancelled"}))
        except ExceptionGroup as errors:
            await self._fail(job.rev, errors.exceptions[0])

    async def _fail(self, rev: int, error: Exception) -> None:
        if not isinstance(error, tl.TurboLensError | BadRun | ValueError | TypeError):
            log.error("a run failed", exc_info=error)
        await self._send(rev, {"kind": "error", "error": error_json(error)})

    async def _make(self, job: Job, index: int, run: Run) -> None:
        async def tell(what: dict[str, Any], png: bytes) -> None:
            if len(job.runs) == 1:
                self._waiting_in_line = what["kind"] == "queued" and what["position"] > 0
            await self._send(job.rev, {**what, "index": index}, [png] if png else [])

        cached = self._session.workshop.known(run) is not None
        made = await self._session.workshop.make(run, tell)
        await self._send_picture(job, index, run, made, cached)

    async def _send_picture(self, job: Job, index: int, run: Run, made: Made, cached: bool) -> None:
        parts = [made.png]
        header: dict[str, Any] = {"kind": "picture", "index": index, "cached": cached, **made.about()}
        if run.features or run.only:
            packed = [packed_features(block) for block in made.features]
            header["features"] = [about for about, _ in packed]
            parts += [columns for _, columns in packed]
            header["known"] = await self._session.atlas.known_in(made.features)
        header["studioMs"] = round((time.perf_counter() - job.received) * 1000, 2)
        await self._send(job.rev, header, parts)

    async def _send(self, rev: int, header: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        await self._session.send({**header, "lane": self._name, "rev": rev}, parts)


class Session:
    """One page, over its WebSocket."""

    def __init__(self, socket: WebSocket, connection: Connection, workshop: Workshop, atlas: Atlas) -> None:
        self._socket = socket
        self._connection = connection
        self._lanes: dict[str, Lane] = {}
        self._sending = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.workshop = workshop
        self.atlas = atlas

    async def serve(self) -> None:
        """Until the page goes."""
        await self._socket.accept()
        forget = self._connection.on_change(self._tell_state)
        try:
            await self.send(self._state())
            while True:
                await self._hear(await self._socket.receive_text())
        except WebSocketDisconnect:
            pass
        finally:
            forget()
            for lane in self._lanes.values():
                lane.cancel()

    async def send(self, header: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        """Send a frame; nothing where the page is gone."""
        frame = pack(header, parts)
        # Where the page went, its runs are cancelled where that is heard of.
        async with self._sending:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await self._socket.send_bytes(frame)

    async def _hear(self, text: str) -> None:
        received = time.perf_counter()
        rev, lane = -1, ""
        try:
            message = json.loads(text)
            if not isinstance(message, dict) or not isinstance(message.get("lane"), str):
                raise BadRun("lane", "is not said")
            rev, lane = int(message.get("rev", -1)), message["lane"]
            kind = message.get("kind")
            if kind == "cancel":
                self._lane(lane).cancel()
                return
            if kind != "run":
                raise BadRun("kind", f"got {kind!r}, expected run or cancel")
            asked = message.get("runs")
            if not isinstance(asked, list) or not 0 < len(asked) <= _MAX_RUNS:
                raise BadRun("runs", f"expected 1 to {_MAX_RUNS} of them")
            runs = tuple(Run.from_json(run) for run in asked)
            self._connection.lens  # noqa: B018 - lost: said at once
            self._lane(lane).offer(Job(rev, runs, received))
        except (ValueError, TypeError, tl.TurboLensError) as error:
            await self.send({"kind": "error", "lane": lane, "rev": rev, "error": error_json(error)})

    def _lane(self, name: str) -> Lane:
        return self._lanes.setdefault(name, Lane(name, self))

    def _state(self) -> dict[str, Any]:
        connection = self._connection
        return {
            "kind": "state",
            "state": connection.state,
            "detail": connection.detail,
            "target": connection.target,
            "generation": connection.generation,
        }

    def _tell_state(self) -> None:
        self.tell(self._state())

    def tell(self, header: dict[str, Any]) -> None:
        """Send a frame from where nothing can be awaited."""
        task = asyncio.get_running_loop().create_task(self.send(header))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
