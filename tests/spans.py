"""What OpenTelemetry's SDK is given, for tests to look at."""

from __future__ import annotations

import functools
import time

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


@functools.cache  # a process has one provider, for good
def exporter() -> InMemorySpanExporter:
    """Where all spans of this process go from now on."""
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace.set_tracer_provider(provider)
    return kept


def of_trace(trace_id: int, awaited: str = "") -> list[ReadableSpan]:
    """The spans of one trace; once it has one of the name that is awaited, since a picture is answered before the loop
    that records its batch comes to do so."""
    until = time.monotonic() + 30
    while True:
        found = [span for span in exporter().get_finished_spans() if span.context.trace_id == trace_id]
        if not awaited or awaited in {span.name for span in found} or time.monotonic() > until:
            return found
        time.sleep(0.01)
