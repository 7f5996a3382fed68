"""A call's spans: whose trace they are in, what they say of it, and what they never say."""

from __future__ import annotations

import asyncio
import http.server
import subprocess
import sys
import threading
import time

import grpc
import pytest
from opentelemetry import trace

from tests import messages, spans

IDS = iter(range(1, 1000))


@pytest.fixture
def metadata():
    """A caller's own trace, which asks to be recorded."""
    spans.exporter()
    return [("traceparent", f"00-{next(IDS):032x}-00000000000000aa-01")]


def own(metadata, awaited: str = "") -> list:
    return spans.of_trace(int(metadata[0][1].split("-")[1], 16), awaited)


async def named(metadata) -> dict:
    """Once its batch is recorded, in the loop that this must not hold."""
    return {span.name: span for span in await asyncio.to_thread(own, metadata, "batch")}


async def test_a_call_is_a_span_of_its_callers_trace_which_the_log_names(running, log_lines, metadata):
    await running.generation.Generate(
        messages.generate(prompt="my secret prompt", seeds=[1, 2], request_id="a-call"), metadata=metadata
    )
    found = await named(metadata)
    assert found.keys() == {"turbolens.v1.GenerationService/Generate", "queue", "batch", "vae", "coding"}
    call = found["turbolens.v1.GenerationService/Generate"]
    assert call.kind is trace.SpanKind.SERVER
    assert call.parent.span_id == 0xAA
    about = {"rpc.system": "grpc", "rpc.service": "turbolens.v1.GenerationService", "rpc.method": "Generate"}
    assert call.attributes == {**about, "rpc.grpc.status_code": 0, "turbolens.request_id": "a-call"}
    assert all(found[name].parent.span_id == call.context.span_id for name in ("queue", "batch", "coding"))
    assert found["batch"].attributes["turbolens.pictures"] == 2
    assert len([span for span in own(metadata) if span.name == "coding"]) == 2
    assert "my secret prompt" not in "".join(span.to_json() for span in own(metadata))
    (line,) = [line for line in log_lines if line["event"] == "rpc"]
    assert line["trace_id"] == metadata[0][1].split("-")[1]


async def test_a_picture_is_decoded_before_it_is_answered(running, fake, metadata):
    decode = fake.decode

    def slow_to_return(*given, **options):
        decode(*given, **options)
        time.sleep(0.3)  # by when the answer has gone out

    fake.decode = slow_to_return
    await running.generation.Generate(messages.generate(prompt="", seeds=[1]), metadata=metadata)
    found = await named(metadata)
    answered = found["turbolens.v1.GenerationService/Generate"].end_time
    assert max(found["vae"].end_time, found["batch"].end_time) <= answered


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_error_is_told_as_what_it_is(running, fake, metadata, streamed):
    ask, call = (
        (messages.stream_generate, running.generation.StreamGenerate)
        if streamed
        else (messages.generate, running.generation.Generate)
    )

    async def refused(seeds):
        answer = call(ask(prompt="", seeds=seeds), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError):
            _ = [event async for event in answer] if streamed else await answer

    await refused(range(100))
    fake.fails = RuntimeError("my secret prompt")
    await refused([1])
    theirs, ours = (span for span in own(metadata) if span.kind is trace.SpanKind.SERVER)
    assert theirs.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert theirs.attributes["turbolens.reason"] == "INVALID_REQUEST"
    assert theirs.status.status_code is trace.StatusCode.UNSET
    assert ours.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INTERNAL.value[0]
    assert ours.status.status_code is trace.StatusCode.ERROR
    assert "my secret prompt" not in "".join(span.to_json() for span in own(metadata))


async def test_who_leaves_has_a_whole_trace_too(running, fake, metadata):
    fake.gate.clear()
    call = running.generation.Generate(messages.generate(prompt="", seeds=[1]), metadata=metadata)
    assert await asyncio.to_thread(fake.started.wait, 30)
    call.cancel()
    assert await asyncio.to_thread(fake.stopped.wait, 30)
    found = await named(metadata)
    code = found["turbolens.v1.GenerationService/Generate"].attributes["rpc.grpc.status_code"]
    assert code == grpc.StatusCode.CANCELLED.value[0]
    assert "batch" in found


async def test_a_shared_batch_is_in_the_trace_of_each_with_links_to_the_others(running, fake, metadata):
    others = [("traceparent", f"00-{next(IDS):032x}-00000000000000bb-01")]
    fake.gate.clear()
    first = running.generation.Generate(messages.generate(prompt="", seeds=[0]))
    first = asyncio.ensure_future(first)
    assert await asyncio.to_thread(fake.started.wait, 30)
    calls = [
        asyncio.ensure_future(running.generation.Generate(messages.generate(prompt="", seeds=[1]), metadata=whose))
        for whose in (metadata, others)
    ]
    while running.serving._readiness.ready.queue.waiting < 2:
        await asyncio.sleep(0.01)
    fake.gate.set()
    await asyncio.gather(first, *calls)
    mine, theirs = await named(metadata), await named(others)
    assert mine["batch"].attributes["turbolens.pictures"] == 2
    (link,) = mine["batch"].links
    assert link.context.span_id == theirs["turbolens.v1.GenerationService/Generate"].context.span_id


@pytest.mark.parametrize("parent", ["00-{id:032x}-00000000000000aa-00", "nonsense", "00-{zero}-{zero}-01", "x" * 4000])
async def test_what_nobody_wants_recorded_is_not_and_nonsense_is_a_trace_of_its_own(running, parent):
    spans.exporter()
    number = next(IDS)
    told = parent.format(id=number, zero="0" * 32)
    await running.generation.Generate(messages.generate(prompt="", seeds=[1]), metadata=[("traceparent", told)])
    assert spans.of_trace(number) == []


def test_spans_are_sent_where_opentelemetrys_variables_say():
    got: list[tuple[str, bytes]] = []

    class Sink(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Sink) as sink:
        threading.Thread(target=sink.serve_forever, daemon=True).start()
        script = (
            "from turbolens_server.telemetry import send_traces; send = send_traces()\n"
            "from turbolens_server.rpc import traces\n"
            "with traces.stage('a stage'): pass\n"
            "send()"
        )
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{sink.server_port}"}
        subprocess.run(
            [sys.executable, "-c", script], check=True, timeout=60,
            env={**environment, "PYTHONPATH": ":".join(sys.path)},
        )  # fmt: skip
        sink.shutdown()
    ((path, body),) = got
    assert path == "/v1/traces"
    assert b"a stage" in body
    assert b"turbolens" in body
