"""What every call has in common: ids, log lines, errors with details; and a server's life from loading to drained."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests import messages
from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import generation_service_pb2_grpc
from turbolens_proto.v1 import model_service_pb2 as ms
from turbolens_server import app, serving
from turbolens_server.config import ServerConfig
from turbolens_server.loading.errors import LoadError
from turbolens_server.unet.backend import BackendError

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def a_request(**fields) -> gs.GenerateRequest:
    return messages.generate(**{"prompt": "my secret prompt", "seeds": [7], **fields})


def details_of(error: grpc.aio.AioRpcError, kind):
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    for detail in status.details:
        found = kind()
        if detail.Unpack(found):
            return found
    raise AssertionError(f"no {kind}")


async def test_a_line_of_log_for_each_call_without_its_prompt(running, log_lines):
    await running.generation.Generate(a_request(seeds=[1, 2]), metadata=[("x-request-id", "from-metadata")])
    await running.generation.Generate(a_request(request_id="mine"), metadata=[("x-request-id", "from-metadata")])
    stream = running.generation.StreamGenerate(messages.stream_generate(prompt="x"))
    assert [event async for event in stream]
    running.engine.fails = RuntimeError("boom")
    with pytest.raises(grpc.aio.AioRpcError):
        await running.generation.Generate(a_request(request_id="bad"))
    calls = [line for line in log_lines if line["event"] == "rpc"]
    assert [(c["request_id"], c["pictures"], c["code"]) for c in calls if len(c["request_id"]) < 32] == [
        ("from-metadata", 2, "OK"), ("mine", 1, "OK"), ("bad", 1, "INTERNAL"),
    ]  # fmt: skip
    assert [c["method"].rpartition("/")[2] for c in calls] == ["Generate", "Generate", "StreamGenerate", "Generate"]
    assert all(c["duration_ms"] > 0 and c["peer"] and c["queue_ms"] >= 0 for c in calls)
    assert [c["batch_size"] for c in calls] == [2, 1, 1, 1]
    (trouble,) = [line for line in log_lines if line["event"] == "unexpected"]
    assert isinstance(trouble["exc_info"], RuntimeError)
    assert trouble["request_id"] == "bad"
    assert "secret" not in str(log_lines)


async def test_a_deadline_is_not_a_cancellation_in_the_log(running, log_lines):
    running.engine.gate.clear()
    with pytest.raises(grpc.aio.AioRpcError):
        await running.generation.Generate(a_request(), timeout=0.2)
    before = len(running.engine.batches)
    call = running.generation.Generate(a_request())
    async with asyncio.timeout(30):
        while len(running.engine.batches) == before:
            await asyncio.sleep(0.01)
        call.cancel()
        while len([line for line in log_lines if line["event"] == "rpc"]) < 2:
            await asyncio.sleep(0.01)
    codes = [line["code"] for line in log_lines if line["event"] == "rpc"]
    assert codes == ["DEADLINE_EXCEEDED", "CANCELLED"]


async def test_of_thousands_of_violations_the_first_hundred_are_found(running):
    features = [{"feature": {"sae": "ä" * 50, "index": i}} for i in range(1024)]
    request = a_request(edits=[{"features": features, "add": {"strength": 1}}] * 4, request_id="many")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.generation.Generate(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "and 99 more" in caught.value.details()
    told = details_of(caught.value, error_details_pb2.BadRequest).field_violations
    info = details_of(caught.value, error_details_pb2.ErrorInfo)
    assert told[0].field == "run.edits[0].features[0].feature.sae"
    assert len(told) + int(info.metadata["violations_left_out"]) == 100
    assert (info.reason, info.metadata["request_id"]) == ("INVALID_REQUEST", "many")


async def test_while_the_model_loads_the_process_is_alive_and_says_so(loading, fake):
    health = health_pb2_grpc.HealthStub(loading.channel)

    async def state(name: str) -> int:
        return (await health.Check(health_pb2.HealthCheckRequest(service=name))).status

    assert (await state(""), await state("turbolens.v1.ModelService")) == (SERVING, NOT_SERVING)
    with pytest.raises(grpc.aio.AioRpcError, match="loading") as caught:
        await loading.models.GetModel(ms.GetModelRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details_of(caught.value, error_details_pb2.RetryInfo).retry_delay.seconds == 1
    await loading.serving.make_ready(fake)
    for name in serving.SERVICES:
        assert await state(name) == SERVING
    await loading.models.GetModel(ms.GetModelRequest())


async def test_reflection_names_the_services(running):
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {*serving.SERVICES, "grpc.health.v1.Health"} <= names


async def test_draining_lets_what_runs_finish_and_refuses_what_is_new(running):
    running.engine.gate.clear()
    call = asyncio.ensure_future(running.generation.Generate(a_request()))
    await asyncio.to_thread(running.engine.started.wait)
    stopping = asyncio.create_task(running.serving.stop(5))
    await asyncio.sleep(0.1)
    async with grpc.aio.insecure_channel(running.address, options=[("grpc.enable_retries", 0)]) as channel:
        generate = channel.unary_unary("/turbolens.v1.GenerationService/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(b"", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    running.engine.gate.set()
    assert len((await call).generations) == 1
    await stopping


async def test_a_grace_that_passes_ends_what_runs(running):
    running.engine.gate.clear()
    call = asyncio.ensure_future(running.generation.Generate(a_request()))
    await asyncio.to_thread(running.engine.started.wait)
    await asyncio.wait_for(running.serving.stop(0.1), 30)
    with pytest.raises(grpc.aio.AioRpcError, match="the server is stopping"):
        await call
    assert running.engine.stopped.is_set()


async def test_the_program_serves_until_it_is_told_to_stop(fake, monkeypatch, log_lines):
    monkeypatch.setattr(serving, "load_from", lambda config, **_: fake)
    program = asyncio.create_task(app._serve(ServerConfig(port=0, grace_s=1, backend="torch")))
    async with asyncio.timeout(30):
        while not any(line["event"] == "ready" for line in log_lines):
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not await program  # nothing was left loading
    assert [line["event"] for line in log_lines] == ["listening", "backend", "ready", "stopping", "stopped"]
    assert log_lines[0]["address"].startswith("127.0.0.1:")
    assert (log_lines[2]["load_s"], fake.warmed_up) == (1.5, [8])


async def health_of(channel, *services) -> list[int]:
    stub = health_pb2_grpc.HealthStub(channel)
    return [(await stub.Check(health_pb2.HealthCheckRequest(service=service))).status for service in services]


LOST = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"


@pytest.mark.parametrize("call", ["generate", "search"])
async def test_a_lost_gpu_ends_the_service(running, log_lines, call):
    everything = ("", *serving.SERVICES)
    assert await health_of(running.channel, *everything) == [SERVING] * 4

    def fail(*_, **__):
        raise RuntimeError(LOST)

    running.engine.denoise = running.engine.embed_text = fail
    for _ in range(2):
        asked = (
            running.generation.Generate(a_request())
            if call == "generate"
            else running.features.SearchFeatures(fs.SearchFeaturesRequest(query="blue"))
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asked
        assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert running.serving.device_lost.is_set()
    assert await health_of(running.channel, *everything) == [NOT_SERVING] * 4
    lost = [line for line in log_lines if line["event"] == "device lost"]
    assert [line["error"] for line in lost] == [LOST.splitlines()[0]]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), RuntimeError("shapes do not fit"),
        ValueError("CUDA error: said by something else"),
    ],
)  # fmt: skip
async def test_an_error_that_passes_leaves_the_service_up(running, error):
    running.engine.fails = error
    with pytest.raises(grpc.aio.AioRpcError):
        await running.generation.Generate(a_request())
    assert not running.serving.device_lost.is_set()
    assert await health_of(running.channel, "", *serving.SERVICES) == [SERVING] * 4
    running.engine.fails = None
    assert len((await running.generation.Generate(a_request())).generations) == 1


LOSES_ITS_GPU = """
from fake_engine import FakeEngine
from turbolens_server import app, serving
engine = FakeEngine()
engine.fails = RuntimeError("CUDA error: an illegal memory access was encountered")
serving.load_from = lambda config, **_: engine
app.main(["--port", "0", "--log-format", "json"])
"""


def test_a_program_that_loses_its_gpu_fails_to_be_started_anew():
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", LOSES_ITS_GPU], stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as program:
        lines = (json.loads(line) for line in program.stderr if line.startswith("{"))
        address = next(line["address"] for line in lines if line["event"] == "listening")
        next(line for line in lines if line["event"] == "ready")
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
            generation_service_pb2_grpc.GenerationServiceStub(channel).Generate(a_request(), timeout=30)
        assert program.wait(30) == 1
        assert {"device lost", "stopped"} <= {line["event"] for line in lines}


@pytest.mark.parametrize("kind", [FloatingPointError, BackendError])
async def test_a_model_that_cannot_warm_up_is_no_model(kind, loading, fake):
    fake.warm_up_fails = kind("the U-Net gave values that are not finite")
    with pytest.raises(LoadError, match="fake: the U-Net gave"):
        await loading.serving.make_ready(fake)


async def test_a_start_without_memory_for_a_batch_says_what_to_lower(loading, fake):
    fake.warm_up_fails = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(LoadError, match="no memory for a batch to warm up with; lower --max-batch, which is 8"):
        await loading.serving.make_ready(fake)


SLOW_LOAD = """
import sys, time
from turbolens_server import app, serving
serving.load_from = lambda config, **_: time.sleep(60)
app.main(["--port", "0", "--log-format", "json"])
"""


def test_a_program_told_to_stop_while_it_loads_stops_at_once():
    with subprocess.Popen([sys.executable, "-c", SLOW_LOAD], stderr=subprocess.PIPE, text=True) as program:
        events = (json.loads(line)["event"] for line in program.stderr if line.startswith("{"))
        assert next(events) == "listening"
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 0  # the load goes on for a minute
        assert list(events) == ["stopping", "stopped"]


SLOW_STOP = """
import asyncio, time
from turbolens_server import app, serving
serving.load_from = lambda config, **_: time.sleep(60)
serving.Serving.stop = lambda self, grace_s: asyncio.sleep(60)
app.main(["--port", "0", "--log-format", "json"])
"""


def test_a_second_signal_ends_a_program_at_once():
    with subprocess.Popen([sys.executable, "-c", SLOW_STOP], stderr=subprocess.PIPE, text=True) as program:
        events = (json.loads(line)["event"] for line in program.stderr if line.startswith("{"))
        assert next(events) == "listening"
        program.send_signal(signal.SIGTERM)
        assert next(events) == "stopping"
        program.send_signal(signal.SIGINT)
        assert program.wait(10) == 128 + signal.SIGINT
        assert list(events) == ["ended"]


async def test_a_taken_port_is_one_clear_line(running):
    port = int(running.address.rpartition(":")[2])
    with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1:{port}"):
        await app._serve(ServerConfig(port=port))


def test_a_model_that_cannot_be_loaded_is_one_clear_line(monkeypatch):
    def fail(config, **_):
        raise LoadError("no such model")

    monkeypatch.setattr(serving, "load_from", fail)
    with pytest.raises(SystemExit) as caught:
        app.main(["--port", "0", "--log-level", "error"])
    assert caught.value.code == "turbolens serve: no such model"
