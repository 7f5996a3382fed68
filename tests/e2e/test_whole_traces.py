"""From a program's own span, through the SDK, to the last hook point of the last step."""

from __future__ import annotations

import collections

from opentelemetry import trace

from tests import spans


def test_a_programs_span_holds_the_call_with_its_steps_saes_and_pictures(lens):
    spans.exporter()
    with trace.get_tracer("a program").start_as_current_span("work") as work:
        lens.generate("my secret prompt", seed=7, steps=3, features=["up.0.1", "down.2.1"])
    found = spans.of_trace(work.get_span_context().trace_id, awaited="vae")
    names = collections.Counter(span.name for span in found)
    assert names == {
        "work": 1, "turbolens.v1.GenerationService/Generate": 1, "queue": 1, "batch": 1, "text": 1, "unet.step": 3,
        "sae": 6, "vae": 1, "coding": 1,
    }  # fmt: skip
    by_id = {span.context.span_id: span for span in found}
    parents = {(span.name, by_id[span.parent.span_id].name) for span in found if span.parent is not None}
    call = "turbolens.v1.GenerationService/Generate"
    assert parents == {
        (call, "work"), ("queue", call), ("batch", call), ("coding", call), ("text", "batch"), ("unet.step", "batch"),
        ("vae", "batch"), ("sae", "unet.step"),
    }  # fmt: skip
    slack_ns = 5_000_000  # between two clocks
    for span in found:
        if span.parent is not None:
            around = by_id[span.parent.span_id]
            assert around.start_time - slack_ns <= span.start_time <= span.end_time <= around.end_time + slack_ns
    points = {span.attributes["turbolens.hook_point"] for span in found if span.name == "sae"}
    assert points == {"up.0.1", "down.2.1"}
    assert "my secret prompt" not in "".join(span.to_json() for span in found)
