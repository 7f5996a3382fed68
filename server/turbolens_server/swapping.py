"""Ready at once, faster later: on a CPU the server starts with plain PyTorch, a process of its own compiles in the
background, and what it made takes over between two batches. The next start finds it in the cache."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from turbolens_server.config import ServerConfig
from turbolens_server.engine.engine import Engine
from turbolens_server.loading.compiled import cannot_compile, find_compiled
from turbolens_server.loading.load import KEPT
from turbolens_server.logs import get_logger
from turbolens_server.rpc.queue import Queue
from turbolens_server.unet.artifacts import ArtifactCache, default_cache
from turbolens_server.unet.compiled import NAME, compiler_missing

_WORKER: Final = "turbolens_server.compile_worker"


class Start(enum.Enum):
    """How an engine begins to serve."""

    SETTLED = enum.auto()
    """By what goes on to run it."""
    UNTIL_COMPILED = enum.auto()
    """By PyTorch, until faster code is compiled in the background."""


def start_compiled(engine: Engine, config: ServerConfig) -> Start:
    """Before an engine serves: let compiled code run it where the cache has it, or say why nothing will."""
    if config.backend != "auto" or engine.device.type != "cpu" or engine.running.unet.name == NAME:
        return Start.SETTLED
    why = cannot_compile(engine.components.unet, engine.device)
    if why is None and (found := find_compiled(engine, _cache(config), KEPT)) is not None:
        engine.use(found)
        return Start.SETTLED
    if why is None and not config.compile_cores:
        why = "compile_cores is 0 and the cache has nothing compiled for this model and machine"
    if why := why or compiler_missing():
        _stay(engine, why)
        return Start.SETTLED
    _tell(engine, "auto: until faster code is compiled in the background")
    return Start.UNTIL_COMPILED


async def swap_when_compiled(
    engine: Engine, queue: Queue, config: ServerConfig, on_swap: Callable[[], None] = lambda: None
) -> None:
    """Compile in a process of its own and let the outcome run what comes next, of an engine that was started
    `UNTIL_COMPILED`. Cancelled, it ends that process.

    Args:
        engine: that serves, and shares its model with those that may come to serve.
        queue: whose engine's thread changes what runs, between two batches.
        config: that the engine was loaded by.
        on_swap: called once it has.
    """
    began = time.monotonic()
    if (why := await _compile(config)) is not None:
        _stay(engine, f"compiling failed ({why})")
        get_logger().warning("not compiled", why=why)
        return
    reason = "auto: compiled for this CPU in the background"
    found = await asyncio.to_thread(find_compiled, engine, _cache(config), reason)
    if found is None:
        _stay(engine, "what was compiled is not in the cache")
        return
    await queue.call(lambda engine: engine.use(found))
    get_logger().info("backend", name=found.unet.name, why=reason, after_s=round(time.monotonic() - began, 1))
    on_swap()


async def _compile(config: ServerConfig) -> str | None:
    """Compile what a configuration serves; why it failed, or None."""
    settings = dataclasses.replace(config, threads=torch.get_num_threads(), backend=NAME, warm_up=False)
    pipe = asyncio.subprocess.PIPE
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", _WORKER),
        stdin=pipe,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=pipe,
        start_new_session=True,  # Ctrl-C in a terminal is for the server, which ends it
    )
    assert worker.stdin is not None
    assert worker.stderr is not None
    try:
        # It stays open: the worker ends where its end is seen, whatever becomes of this process.
        worker.stdin.write(json.dumps(dataclasses.asdict(settings)).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await worker.stdin.drain()
        said = (await worker.stderr.read()).decode(errors="replace").strip().splitlines()
        code = await worker.wait()
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
    return None if code == 0 else said[-1] if said else f"exit code {code}"


def _stay(engine: Engine, why: str) -> None:
    _tell(engine, f"auto: plain PyTorch, since {why}")


def _tell(engine: Engine, reason: str) -> None:
    """Say why what runs it runs it."""
    engine.use(dataclasses.replace(engine.running, reason=reason))


def _cache(config: ServerConfig) -> ArtifactCache:
    return ArtifactCache(Path(config.cache).expanduser() if config.cache else default_cache())
