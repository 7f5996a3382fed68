"""A server over a real socket, on an engine without a model."""

from __future__ import annotations

import dataclasses
import logging

import grpc
import pytest
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


@pytest.fixture
def log_lines(caplog):
    """What the server logs, as it logs it: a dict for each event."""

    class Lines(logging.Handler):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[dict] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.seen.append(record.msg)

    lines = Lines()
    logger = logging.getLogger("turbolens")
    logger.addHandler(lines)
    with caplog.at_level(logging.INFO, "turbolens"):
        yield lines.seen
    logger.removeHandler(lines)


@pytest.fixture
def fake():
    engine = FakeEngine()
    yield engine
    # A test that failed half-way must not leave a thread waiting.
    engine.gate.set()
    engine.decode_gate.set()


@pytest.fixture
async def loading(fake):
    """A server whose model is not there yet."""
    serving = Serving(ServerConfig(max_queue=2))
    port = await serving.start("127.0.0.1:0")
    # Retries would hide what the server answers.
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_retries", 0)]) as channel:
        yield Running(serving, fake, channel, f"127.0.0.1:{port}")
    fake.gate.set()
    await serving.stop(0)


@pytest.fixture
async def running(loading, fake):
    """A server that is ready."""
    await loading.serving.make_ready(fake)
    return loading
