"""Run the U-Net's TensorRT engine. Meant for a GPU, and not yet run on one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbolens_server.unet.artifacts import ArtifactCache, Entry
from turbolens_server.unet.backend import BackendError
from turbolens_server.unet.spec import GraphSpec
from turbolens_server.unet.tensorrt_api import TensorRT
from turbolens_server.unet.tensorrt_build import PLAN_FILE, Bucket, engine_key


def find_engine(
    cache: ArtifactCache, graph_key: Mapping[str, Any], tensorrt: TensorRT, target: str, latent: tuple[int, int]
) -> Entry:
    """The engine of a graph that this TensorRT can run on this target for latents of one (height, width).

    Of several it is the one for the largest batches. What is damaged stands in the way only where it is what is
    wanted.

    Raises:
        DamagedError: it is damaged.
        BackendError: there is none; the text tells those for other versions, GPUs and sizes.
    """
    wanted = engine_key(graph_key, tensorrt, target)
    fitting: list[tuple[int, Path]] = []
    others = set()
    for folder in cache.entries():
        if folder.parent.name != "engines" or (key := cache.key_of(folder)) is None:
            continue
        if key["graph"] != wanted["graph"]:
            continue
        buckets = [Bucket(*shape) for shape in key["buckets"]]
        batches = [bucket.batch for bucket in buckets if (bucket.height, bucket.width) == latent]
        if not batches or any(key[name] != value for name, value in wanted.items()):
            sizes = sorted({f"{bucket.height}x{bucket.width}" for bucket in buckets})
            others.add(f"{key['tensorrt']} {key['version']} on {key['target']} for latents of {', '.join(sizes)}")
        else:
            fitting.append((max(batches), folder))
    if not fitting:
        beside = f" (there is one for {'; '.join(sorted(others))})" if others else ""
        raise BackendError(
            f"{cache.root} holds no engine of this model for {tensorrt} on {target} for latents of "
            f"{latent[0]}x{latent[1]}{beside}; "
            "run `turbolens engine build` with the same --model, --sae, --dtype and --size"
        )
    return cache.verify(max(fitting)[1])


def buckets_of(entry: Entry) -> list[Bucket]:
    """The buckets of an engine in the order of its profiles: by batch, then by size."""
    return [Bucket(*shape) for shape in entry.key["buckets"]]


def split_batch(batch: int, buckets: Sequence[Bucket]) -> list[tuple[int, int, Bucket]]:
    """Cut a batch into runs (first row, row after the last, bucket), buckets of one size being given.

    As many rows as the largest bucket takes at a time; the rest goes to the smallest bucket that holds it.
    """
    largest = max(bucket.batch for bucket in buckets)
    runs = []
    for start in range(0, batch, largest):
        rows = min(largest, batch - start)
        bucket = min((bucket for bucket in buckets if bucket.batch >= rows), key=lambda bucket: bucket.batch)
        runs.append((start, start + rows, bucket))
    return runs


@dataclasses.dataclass(frozen=True)
class _Slot:
    """One profile of the engine with its own buffers, at addresses that never change."""

    context: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class TensorRTRunner:
    """One pass of an engine. Rows that a bucket has too many are computed and dropped."""

    def __init__(
        self, tensorrt: TensorRT, entry: Entry, spec: GraphSpec, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load an engine into the GPU.

        Raises:
            BackendError: this TensorRT refuses it, or the GPU has too little memory.
        """
        self._buckets = buckets_of(entry)
        self._stream = torch.cuda.Stream(device)
        with torch.cuda.device(device):
            self._engine, self._messages = deserialize(tensorrt, entry.folder / PLAN_FILE)
            self._slots = {}
            for at, bucket in enumerate(self._buckets):
                self._slots[bucket] = self._slot(at, bucket, spec, device, dtype)

    def _slot(self, profile: int, bucket: Bucket, spec: GraphSpec, device: torch.device, dtype: torch.dtype) -> _Slot:
        context = self._engine.create_execution_context()
        if context is None:
            raise BackendError(f"no context for {bucket}: {self._messages.last()}; is the GPU's memory full?")
        context.set_optimization_profile_async(profile, self._stream.cuda_stream)
        shape = (bucket.batch, bucket.height, bucket.width)
        inputs = {
            name: torch.zeros(spec.input_shape(name, *shape), dtype=spec.input_dtype(name, dtype), device=device)
            for name in spec.input_names()
        }
        sample = inputs["sample"]
        outputs = {name: sample.new_empty(spec.output_shape(name, sample)) for name in spec.output_names()}
        for name, tensor in inputs.items():
            context.set_input_shape(name, tuple(tensor.shape))
        for name, tensor in (inputs | outputs).items():
            context.set_tensor_address(name, tensor.data_ptr())
        return _Slot(context, inputs, outputs)

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """See :data:`turbolens_server.unet.graph.Execute`.

        Raises:
            BackendError: no bucket has this size, or the GPU reports an error.
        """
        batch, _, height, width = inputs["sample"].shape
        fitting = [bucket for bucket in self._buckets if (bucket.height, bucket.width) == (height, width)]
        if not fitting:
            raise BackendError(f"the engine has no profile for latents of {height} x {width}")
        for start, stop, bucket in split_batch(batch, fitting):
            slot = self._slots[bucket]
            rows = stop - start
            for name, tensor in inputs.items():
                slot.inputs[name][:rows].copy_(tensor[start:stop])
            caller = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(caller)
            if not slot.context.execute_async_v3(self._stream.cuda_stream):
                raise BackendError(f"TensorRT could not run a batch of {rows}: {self._messages.last()}")
            caller.wait_stream(self._stream)
            for name, tensor in outputs.items():
                tensor[start:stop].copy_(slot.outputs[name][:rows])


def deserialize(tensorrt: TensorRT, plan: Path) -> tuple[Any, Any]:
    """An engine from its plan, with the logger that it keeps writing to.

    Raises:
        BackendError: with TensorRT's reason: another version, another GPU, no GPU, too little memory.
    """
    messages = tensorrt.messages()
    runtime = tensorrt.api.Runtime(messages.logger)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise BackendError(f"{tensorrt} cannot load {plan} ({messages.last()})")
    return engine, messages
