"""Where the spans of `turbolens serve --traces` go: by OTLP to whatever OpenTelemetry's own variables name."""

from __future__ import annotations

import os
from collections.abc import Callable


def send_traces() -> Callable[[], object]:
    """Install OpenTelemetry's SDK in this process, which must be the program's own; returns what sends the last spans.

    Where to, how often and which of them is said by `OTEL_EXPORTER_OTLP_ENDPOINT` (else this machine's port 4318, over
    HTTP), `OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME` and the like.

    Raises:
        ModuleNotFoundError: the extra `traces` is not installed.
    """
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    os.environ.setdefault("OTEL_SERVICE_NAME", "turbolens")
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown
