"""Build TensorRT engines from an exported graph, ahead of time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from turbolens_server.files import available_host_bytes
from turbolens_server.unet.artifacts import ArtifactCache, Entry, tell_of_waiting
from turbolens_server.unet.backend import BackendError
from turbolens_server.unet.export import GRAPH_FILE
from turbolens_server.unet.spec import GraphSpec
from turbolens_server.unet.tensorrt_api import TensorRT

PLAN_FILE: Final = "unet.plan"
"""Within an entry."""
_GIB: Final = 2**30
# What a build takes in memory: a fixed part, and this many times the weights.
_MEMORY_BASE: Final = 1.5 * _GIB
_MEMORY_PER_WEIGHT: Final = 3.5


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A shape that an engine has a profile for."""

    batch: int
    height: int
    """Of the latent, in cells."""
    width: int


def engine_key(graph: Mapping[str, Any], tensorrt: TensorRT, target: str) -> dict[str, Any]:
    """All that decides whether an engine can run, but its buckets."""
    return {"graph": dict(graph), "tensorrt": tensorrt.flavour, "version": tensorrt.version, "target": target}


def ensure_engine(
    cache: ArtifactCache,
    graph: Entry,
    spec: GraphSpec,
    tensorrt: TensorRT,
    target: str,
    buckets: Sequence[Bucket],
    on_wait: Callable[[], None] = tell_of_waiting,
) -> Entry:
    """The engine of a graph for a target such as "sm89", from the cache or built now.

    Raises:
        BackendError: TensorRT cannot build it, memory or disk do not suffice, or the cache cannot be used.
    """
    shapes = [[bucket.batch, bucket.height, bucket.width] for bucket in sorted(set(buckets))]
    key = {**engine_key(graph.key, tensorrt, target), "buckets": shapes}

    def make(folder: Path) -> dict[str, Any]:
        needed, free = _MEMORY_BASE + _MEMORY_PER_WEIGHT * graph.size, available_host_bytes(Path("/"))
        if free is not None and free < needed:
            raise BackendError(
                f"building takes about {needed / _GIB:.1f} GiB of memory and {free / _GIB:.1f} GiB are free"
            )
        start = time.monotonic()
        plan = build_plan(tensorrt, graph.folder / GRAPH_FILE, spec, target, sorted(set(buckets)))
        with (folder / PLAN_FILE).open("wb") as file:
            file.write(plan)
        return {"build_s": round(time.monotonic() - start, 1)}

    return cache.add("engines", key, make, needs_bytes=graph.size, on_wait=on_wait)


def build_plan(tensorrt: TensorRT, graph: Path, spec: GraphSpec, target: str, buckets: Sequence[Bucket]) -> memoryview:
    """Parse and build a graph with one optimisation profile for each bucket, in their order.

    Raises:
        BackendError: with TensorRT's reason.
    """
    api = tensorrt.api
    messages = tensorrt.messages()
    builder = api.Builder(messages.logger)
    if builder is None:
        raise BackendError(f"{tensorrt} has no builder here ({messages.last()})")
    config = builder.create_builder_config()
    tensorrt.aim(config, target)
    network = builder.create_network(tensorrt.network_flags())
    parser = api.OnnxParser(network, messages.logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]
        raise BackendError(f"{tensorrt} cannot read {graph} ({' '.join('; '.join(reasons).split())[:300]})")
    for bucket in buckets:
        profile = builder.create_optimization_profile()
        for at in range(network.num_inputs):
            name = network.get_input(at).name
            shape = spec.input_shape(name, bucket.batch, bucket.height, bucket.width)
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"{tensorrt} cannot build the graph for {target} ({messages.last()})")
    return memoryview(plan)
