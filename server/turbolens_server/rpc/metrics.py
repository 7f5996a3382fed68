"""What a server counts of itself, as Prometheus reads it. Every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.process_collector import ProcessCollector

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PICTURES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
STAGES: Final = ("text", "unet", "sae", "vae", "coding")


class Metrics:
    """Counters, gauges and histograms; all names begin with `turbolens_`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("turbolens_requests", "Calls that ended", ["method", "code"], registry=registry)
        self.request_seconds = Histogram(
            "turbolens_request_seconds", "From a call's first byte to its end", ["method"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.refusals = Counter(
            "turbolens_refusals", "Calls that were refused, by reason", ["reason"], registry=registry
        )
        self.cancellations = Counter("turbolens_cancellations", "Calls whose callers left", registry=registry)
        self.queue_wait = Histogram(
            "turbolens_queue_wait_seconds", "From a request's arrival to its first batch",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch_size = Histogram("turbolens_batch_size", "Pictures of a batch", buckets=_PICTURES, registry=registry)
        self.stage_seconds = Histogram(
            "turbolens_stage_seconds", "Time of a batch in a stage; coding, of one picture", ["stage"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.steps = Counter(
            "turbolens_unet_steps",
            "Steps of pictures: used; saved, since their caller left before; wasted, run after their caller had left",
            ["fate"], registry=registry,
        )  # fmt: skip
        self.batches_split = Counter(
            "turbolens_batches_split", "Batches that ran again in halves, for lack of memory", registry=registry
        )
        self.answers_again = Counter(
            "turbolens_answers_again", "Repeated requests that got the first one's answer", registry=registry
        )
        self._build = Info("turbolens_build", "What runs", registry=registry)
        self.ready = Gauge("turbolens_ready", "1 where requests are served", registry=registry)

    def gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        """A number that is read when Prometheus asks."""
        Gauge(f"turbolens_{name}", about, registry=self.registry).set_function(read)

    def build(self, about: Mapping[str, str]) -> None:
        """Say what runs: labels of `turbolens_build_info`."""
        self._build.info(dict(about))
