"""A server over a real socket on an engine without a model, and stubs to it."""

from __future__ import annotations

import contextlib
import dataclasses

import grpc
from fake_engine import FakeEngine

from turbolens_proto.v1 import feature_service_pb2_grpc, generation_service_pb2_grpc, model_service_pb2_grpc
from turbolens_server.config import ServerConfig
from turbolens_server.serving import Serving


@dataclasses.dataclass
class Running:
    """A server, its engine, and stubs to it."""

    serving: Serving
    engine: FakeEngine
    channel: grpc.aio.Channel
    address: str

    def __post_init__(self) -> None:
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.features = feature_service_pb2_grpc.FeatureServiceStub(self.channel)
        self.generation = generation_service_pb2_grpc.GenerationServiceStub(self.channel)


@contextlib.asynccontextmanager
async def serve(engine, *, ready=True, **settings):
    """Serve an engine; `settings` are those of a server."""
    serving = Serving(ServerConfig(**settings))
    port = await serving.start("127.0.0.1:0")
    try:
        if ready:
            await serving.make_ready(engine)
        # Retries would hide what the server answers.
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_retries", 0)]) as channel:
            yield Running(serving, engine, channel, f"127.0.0.1:{port}")
    finally:
        engine.gate.set()
        engine.decode_gate.set()
        await serving.stop(0)
