"""`turbolens.v1.AdminService`: other SAEs while the server serves.

What is served is one immutable `Ready` that each request takes when it is let in and keeps to its end; a change puts
another in its place.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from turbolens_proto.v1 import admin_service_pb2 as pb
from turbolens_proto.v1 import admin_service_pb2_grpc, model_service_pb2
from turbolens_server.catalog.catalog import Catalog
from turbolens_server.engine.engine import Engine
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.exchange import reloaded, with_loaded, without
from turbolens_server.logs import get_logger
from turbolens_server.rpc import convert
from turbolens_server.rpc.errors import RpcError, not_found
from turbolens_server.rpc.servicers import Readiness, Ready
from turbolens_server.sae.bundle import BundleError


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """One change at a time; belongs to one event loop."""

    def __init__(self, readiness: Readiness, max_batch: int) -> None:
        self._readiness = readiness
        self._max_batch = max_batch
        self._one = asyncio.Lock()

    async def LoadSaes(self, request: pb.LoadSaesRequest, context: Any) -> pb.LoadSaesResponse:  # noqa: N802
        change = functools.partial(with_loaded, source=request.source, max_batch=self._max_batch, force=request.force)
        return pb.LoadSaesResponse(saes=await self._change(change))

    async def UnloadSae(self, request: pb.UnloadSaeRequest, context: Any) -> pb.UnloadSaeResponse:  # noqa: N802
        change = functools.partial(without, name=request.name, max_batch=self._max_batch)
        return pb.UnloadSaeResponse(saes=await self._change(change, request.name))

    async def ReloadSae(self, request: pb.ReloadSaeRequest, context: Any) -> pb.ReloadSaeResponse:  # noqa: N802
        change = functools.partial(reloaded, name=request.name, max_batch=self._max_batch)
        return pb.ReloadSaeResponse(saes=await self._change(change, request.name))

    async def _change(
        self, change: Callable[[Engine], Engine], name: str | None = None
    ) -> Sequence[model_service_pb2.Sae]:
        """Serve what a change makes of the engine that serves, once it has been tried; returns all SAEs.

        Raises:
            RpcError: NOT_FOUND where no SAE has the name that the change is for, FAILED_PRECONDITION where what is
                asked for cannot be served; what was served goes on.
        """
        async with self._one:
            ready = self._readiness.get()
            before = ready.engine.info.saes
            if name is not None and name not in before:
                raise not_found(f"no SAE {name[:60]!r}; this server has {', '.join(before) or 'none'}")
            try:
                engine = await asyncio.to_thread(change, ready.engine)
                saes = engine.info.saes
                new = [name for name, sae in saes.items() if before.get(name) is not sae]
                await ready.queue.call(lambda _: engine.try_saes(new))
                catalog = await asyncio.to_thread(Catalog, saes, _embedding(ready))
            except (LoadError, BundleError, FloatingPointError) as error:
                raise RpcError(grpc.StatusCode.FAILED_PRECONDITION, str(error), "SAE_NOT_SERVED") from None
            self._readiness.ready = Ready(engine, ready.queue, catalog)
            get_logger().info("saes", served=list(saes), new=new, gone=[name for name in before if name not in saes])
            return convert.saes(engine.info, catalog.label_counts())


def _embedding(ready: Ready) -> Callable[[Sequence[str]], npt.NDArray[np.float32]]:
    """The model's text encoder for another thread, in the engine's own between two batches."""
    loop = asyncio.get_running_loop()

    def embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        call = ready.queue.call(lambda engine: engine.embed_text(texts))
        return asyncio.run_coroutine_threadsafe(call, loop).result()

    return embed
