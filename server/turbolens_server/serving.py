"""The gRPC server: put together, started, made ready, drained."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import time
from pathlib import Path
from typing import Any, Final

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from turbolens_proto.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    feature_service_pb2,
    feature_service_pb2_grpc,
    generation_service_pb2,
    generation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from turbolens_server.catalog.catalog import Catalog
from turbolens_server.config import ServerConfig
from turbolens_server.engine.engine import Engine
from turbolens_server.files import first_line
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.load import load_engine
from turbolens_server.logs import get_logger
from turbolens_server.rpc.admin import AdminServicer
from turbolens_server.rpc.admission import Ledger
from turbolens_server.rpc.calls import CallInterceptor, Writers
from turbolens_server.rpc.errors import device_is_lost, says_out_of_memory
from turbolens_server.rpc.metrics import Metrics
from turbolens_server.rpc.queue import Queue, QueueLimits
from turbolens_server.rpc.reflection import enable_reflection
from turbolens_server.rpc.servicers import FeatureServicer, GenerationServicer, ModelServicer, Readiness, Ready
from turbolens_server.rpc.tls import TlsFiles, server_credentials
from turbolens_server.rpc.tokens import Tokens
from turbolens_server.rpc.transport import server_options
from turbolens_server.rpc.validation import MAX_REFERENCES, RequestLimits
from turbolens_server.rpc.warnings import late_start
from turbolens_server.side_ports import SidePorts
from turbolens_server.swapping import Start, start_compiled, swap_when_compiled
from turbolens_server.unet.backend import BackendError

SERVICES: Final = (
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    feature_service_pb2.DESCRIPTOR.services_by_name["FeatureService"].full_name,
    generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
)
ADMIN: Final = admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
_OF_GRACE: Final = 0.8
"""Of the grace that may wait as work, so that all of it is finished within the grace of a stop."""
_LAST_BYTES_S: Final = 0.5
"""For the last answers to reach their callers."""


def load_from(config: ServerConfig, *, ahead_of_modules: bool = False) -> Engine:
    """The engine that a configuration asks for; raises LoadError. `ahead_of_modules` as for `load_engine`."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return load_engine(
        model=config.model,
        device=config.device,
        dtype=config.dtype,
        variant=config.variant,
        model_config=config.model_config,
        vae=config.vae,
        saes=config.sae or None,
        force_sae=config.force_sae,
        gate=config.gate or None,
        force_gate=config.force_gate,
        max_steps=config.max_steps,
        max_batch=config.max_batch,
        size=config.size or None,
        more_sizes=config.more_sizes,
        backend=config.backend,
        onnx_regions=config.onnx_regions,
        cache=Path(config.cache).expanduser() if config.cache else None,
        loras=config.lora,
        scheduler=config.scheduler or None,
        timestep_spacing=config.timestep_spacing or None,
        timesteps=config.timesteps,
        embedded_guidance=config.embedded_guidance,
        ahead_of_modules=ahead_of_modules,
    )


class Serving:
    """One server: `start` it (alive), `make_ready` with an engine (ready), `stop` it (drained)."""

    def __init__(self, config: ServerConfig) -> None:
        """Put a server together.

        Raises:
            ConfigError: the file of tokens cannot be used.
        """
        self._config = config
        self._readiness = Readiness(
            RequestLimits(
                max_seeds=config.max_seeds,
                max_references=min(MAX_REFERENCES, config.max_batch - 1),
                max_lanes=config.max_batch,
            )
        )
        self._health = health.HealthServicer()
        self.device_lost = asyncio.Event()
        """The GPU answers this process no more: nothing but a new process can serve."""
        self._telling: asyncio.Task[None] | None = None
        self._swapping: asyncio.Task[None] | None = None
        self._ledger = Ledger(config.max_held_mib * 2**20)
        self.metrics = Metrics()
        known = Tokens(Path(config.tokens)) if config.tokens else None
        writers = Writers(config.stalled_s)
        self._calls = CallInterceptor(self._ledger, self._readiness.checks, writers, self.metrics, known)
        self._side = SidePorts(config.host, self._health, self.metrics)
        options = server_options(config.max_connection_age_s)
        self._server = grpc.aio.server(interceptors=[self._calls], options=options)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self._readiness), self._server)
        feature_service_pb2_grpc.add_FeatureServiceServicer_to_server(FeatureServicer(self._readiness), self._server)
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationServicer(self._readiness), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._admin = grpc.aio.server(interceptors=[self._calls], options=options) if config.admin_port else None
        if self._admin is not None:
            admin = AdminServicer(self._readiness, config.max_batch)
            admin_service_pb2_grpc.add_AdminServiceServicer_to_server(admin, self._admin)
            model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self._readiness), self._admin)
        if config.reflection:
            names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
            enable_reflection(names, self._server)
            if self._admin is not None:
                enable_reflection((ADMIN, SERVICES[0]), self._admin)

    async def start(self, address: str) -> int:
        """Listen on `host:port` or `unix:path`; returns the port. Health says alive, and no service serves yet.

        Raises:
            RuntimeError: an address cannot be bound.
            ConfigError: the certificate cannot be used.
        """
        config = self._config
        port = self._listen(self._server, address)
        if self._admin is not None:
            self._listen(self._admin, f"{config.host}:{config.admin_port}")
            await self._admin.start()
        await self._side.open(config.health_port, config.metrics_port)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        return port

    def _listen(self, server: Any, address: str) -> int:
        config = self._config
        if not config.tls_cert:
            return int(server.add_insecure_port(address))
        ca = Path(config.tls_client_ca) if config.tls_client_ca else None
        files = TlsFiles(Path(config.tls_cert), Path(config.tls_key), ca)
        return int(server.add_secure_port(address, server_credentials(files)))

    async def make_ready(self, engine: Engine) -> None:
        """Serve an engine.

        Raises:
            LoadError: warming up, the model gave values that are not finite, or what runs its U-Net failed.
        """
        config = self._config
        limits = QueueLimits(
            config.max_batch,
            config.batch_wait_ms / 1000,
            config.max_queue,
            config.max_queue_pictures,
            config.grace_s * _OF_GRACE,
        )
        queue = Queue(engine, limits, on_error=self._on_error, metrics=self.metrics)
        try:
            if config.warm_up:
                await queue.warm_up()
            catalog = await queue.call(lambda engine: Catalog(engine.info.saes, engine.embed_text))
        except Exception as error:
            await queue.close()
            if isinstance(error, FloatingPointError | BackendError):
                raise LoadError(f"{engine.info.model}: {error}") from error
            if says_out_of_memory(error):
                way_out = f"lower --max-batch, which is {config.max_batch}"
                raise LoadError(f"{engine.info.model}: no memory for a batch to warm up with; {way_out}") from error
            raise
        self._readiness.ready = Ready(engine, queue, catalog)
        self._watch(engine, queue)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def swap_when_compiled(self, engine: Engine) -> None:
        """Compile in the background, and go on to what is compiled."""
        if (ready := self._readiness.ready) is not None:
            swap = swap_when_compiled(engine, ready.queue, self._config, lambda: self._tell_build(engine))
            self._swapping = asyncio.create_task(swap)

    async def stop(self, grace_s: float) -> None:
        """Say that nothing serves, refuse what is new, let what runs finish within the grace, and end."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.metrics.ready.set(0)
        if self._swapping is not None:
            self._swapping.cancel()
            await asyncio.wait({self._swapping})
        ready = self._readiness.ready
        if ready is not None and (refused := ready.queue.stop_within(grace_s)):
            get_logger().warning("refused", requests=refused, why="they cannot be finished within the grace")
        ended = await self._calls.drain(grace_s)
        if not ended and ready is not None and (left := ready.queue.give_up()):
            get_logger().warning("cut off", requests=left, why="they took longer than the grace")
            ended = await self._calls.drain(_LAST_BYTES_S)
        for server in filter(None, (self._server, self._admin)):
            await server.stop(_LAST_BYTES_S if ended else 0)
        self._readiness.checks.close()
        if ready is not None:
            await ready.queue.close()
        await self._side.close()

    def _watch(self, engine: Engine, queue: Queue) -> None:
        metrics = self.metrics
        metrics.ready.set(1)
        self._tell_build(engine)
        metrics.gauge("queue_requests", "Requests that wait", lambda: queue.waiting)
        metrics.gauge("queue_pictures", "Pictures that wait", lambda: queue.waiting_pictures)
        metrics.gauge("running_pictures", "Pictures in the engine", lambda: queue.running_pictures)
        metrics.gauge("undelivered_bytes", "Made and not taken by callers", lambda: queue.undelivered_bytes)
        metrics.gauge("held_bytes", "Held by requests, by estimate", lambda: self._ledger.held)

    def _tell_build(self, engine: Engine) -> None:
        info = engine.info
        about = {"model": info.model, "backend": info.backend, "device": info.device, "dtype": info.dtype}
        self.metrics.build({"version": info.versions["turbolens"], **about})

    def _on_error(self, error: Exception) -> None:
        if device_is_lost(error) and not self.device_lost.is_set():
            self.device_lost.set()
            get_logger().error("device lost", error=first_line(error))
            self._telling = asyncio.create_task(self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING))

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        # The empty name is the process: alive from the first moment, so that a loading pod is not killed.
        states = health_pb2.HealthCheckResponse
        await self._health.set("", states.NOT_SERVING if self.device_lost.is_set() else states.SERVING)
        for name in SERVICES:
            await self._health.set(name, status)


def keep_what_is_loaded() -> None:
    """Leave what is there by now out of Python's garbage collections, as it stays for the process's life, and let them
    begin.

    A full collection looks at every object: half a million of a loaded model and its libraries held the event loop,
    health checks among the rest, for a third of a second each time.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


async def load_and_serve(serving: Serving, config: ServerConfig) -> None:
    """Load the engine off the loop and make the server ready with it.

    Cancelled while the model loads, it leaves the loading thread behind, which nobody waits for: see `app.main`.
    """
    loaded: concurrent.futures.Future[tuple[Engine, Start]] = concurrent.futures.Future()
    loaded.set_running_or_notify_cancel()

    def load() -> None:
        try:
            engine = load_from(config, ahead_of_modules=True)
            loaded.set_result((engine, start_compiled(engine, config)))
        except BaseException as error:
            loaded.set_exception(error)

    start = time.monotonic()
    threading.Thread(target=load, name="load", daemon=True).start()
    engine, began = await asyncio.wrap_future(loaded)
    await serving.make_ready(engine)
    if began is Start.UNTIL_COMPILED:
        serving.swap_when_compiled(engine)
    keep_what_is_loaded()
    info, gib = engine.info, 2**30
    get_logger().info("backend", name=info.backend, why=info.backend_reason)
    if (late := late_start(info)) is not None:
        get_logger().warning("late start", why=late)
    get_logger().info(
        "ready",
        model=info.model,
        saes=list(info.saes),
        device=info.device,
        dtype=info.dtype,
        threads=torch.get_num_threads(),
        load_s=round(info.load_s, 2),
        ready_s=round(time.monotonic() - start, 2),
        memory_gib=round(info.memory.total / gib, 2),
        memory_free_gib=None if info.memory.available is None else round(info.memory.available / gib, 2),
    )
