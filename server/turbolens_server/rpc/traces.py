"""Spans of OpenTelemetry: one for each call, and in it what its pictures waited for and went through.

Only OpenTelemetry's API is used here. It does nothing until a program installs the SDK, as `turbolens serve --traces`
does and whoever embeds a server may. grpcio's own instrumentation is not used: it tells of a servicer that raises as of
one that succeeded, and breaks streams that write for themselves.

A batch belongs to all whose pictures ran in it, so each of them gets its spans, with links to the calls of the others.
No span holds a prompt, or anything else that a caller wrote but its request id.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import grpc
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from turbolens_server.engine.types import StepTimes

Attributes = Mapping[str, str | int]
_TRACER: Final = trace.get_tracer("turbolens")
_W3C: Final = TraceContextTextMapPropagator()
_FAULTS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Codes that are a server's errors by OpenTelemetry's conventions; the others are a caller's own."""


@contextlib.contextmanager
def of_call(method: str, metadata: Mapping[str, Any]) -> Iterator[Span]:
    """The span of a call, "turbolens.v1.GenerationService/Generate", current while it is served; `end_call` ends it.

    It belongs to the trace that the caller's metadata name, as W3C has them (`traceparent`).
    """
    service, _, name = method.partition("/")
    parent = _W3C.extract({key: value for key, value in metadata.items() if isinstance(value, str)})
    about = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    span = _TRACER.start_span(method, parent, SpanKind.SERVER, about)
    with trace.use_span(span, record_exception=False, set_status_on_exception=False):
        yield span


def end_call(span: Span, code: grpc.StatusCode, request_id: str, reason: str = "") -> None:
    """Say how a call went."""
    span.set_attributes({"rpc.grpc.status_code": code.value[0], "turbolens.request_id": request_id})
    if reason:
        span.set_attribute("turbolens.reason", reason)
    if code in _FAULTS:
        span.set_status(StatusCode.ERROR, reason or code.name)
    span.end()


def trace_id(span: Span) -> str | None:
    """The id of a span's trace, for the log; None where nobody traces."""
    known = span.get_span_context()
    return trace.format_trace_id(known.trace_id) if known.is_valid else None


def here() -> Context:
    """Where spans of the current call belong, for what happens to it elsewhere."""
    return contexts.get_current()


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """A span of the current call while something is done for it."""
    with _TRACER.start_as_current_span(name, record_exception=False, set_status_on_exception=False):
        yield


def record(
    parent: Context,
    name: str,
    started: float,
    ended: float,
    attributes: Attributes | None = None,
    links: Sequence[Link] = (),
) -> Context:
    """A span that is over.

    Args:
        parent: where it belongs.
        name: of it.
        started: on the clock of `time.monotonic`, which is the event loop's.
        ended: likewise.
        attributes: of it.
        links: to spans of other calls.

    Returns:
        Where spans within it belong.
    """
    to_wall_ns = time.time_ns() - int(time.monotonic() * 1e9)
    span = _TRACER.start_span(
        name, parent, attributes=attributes, links=links, start_time=to_wall_ns + int(started * 1e9)
    )
    span.end(to_wall_ns + int(ended * 1e9))
    return trace.set_span_in_context(span, parent)


def record_batch(
    parents: Sequence[Context], pictures: int, denoised: tuple[float, float], decoded: tuple[float, float] | None,
    steps: Sequence[StepTimes],
) -> None:  # fmt: skip
    """A batch in the trace of every call that had pictures in it.

    Args:
        parents: where each call's spans belong.
        pictures: of the batch.
        denoised: when its first stage began and ended.
        decoded: its second; None where it did not come to it.
        steps: when its steps ran.
    """
    callers = [trace.get_current_span(parent).get_span_context() for parent in parents]
    ended = denoised[1] if decoded is None else decoded[1]
    for parent, own in zip(parents, callers, strict=True):
        if not own.trace_flags.sampled:
            continue
        links = [Link(other) for other in callers if other.is_valid and other != own]
        batch = record(parent, "batch", denoised[0], ended, {"turbolens.pictures": pictures}, links)
        if steps:
            record(batch, "text", denoised[0], steps[0].started)
        for number, times in enumerate(steps):
            step = record(batch, "unet.step", times.started, times.ended, {"turbolens.step": number})
            for point, began, over in times.taps:
                record(step, "sae", began, over, {"turbolens.hook_point": point})
        if decoded is not None:
            record(batch, "vae", *decoded)
