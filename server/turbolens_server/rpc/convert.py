"""From the engine's values to messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt

from turbolens_proto.v1 import feature_service_pb2, generation_service_pb2, model_service_pb2, run_pb2, steering_pb2
from turbolens_server.catalog.query import MAX_CHARS
from turbolens_server.engine.info import EngineInfo, GateInfo
from turbolens_server.engine.types import Result, SparseCodes
from turbolens_server.images import encode_image
from turbolens_server.rpc.errors import RpcError
from turbolens_server.rpc.questions import MAX_FOUND, MAX_LISTED, MAX_QUERY_CHARS
from turbolens_server.rpc.queue import QueueLimits
from turbolens_server.rpc.transport import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from turbolens_server.rpc.validation import (
    MAX_REQUEST_ID_CHARS,
    RequestLimits,
    Selection,
    ValidRequest,
)
from turbolens_server.steering.choice import Chosen, ScoredFeature
from turbolens_server.steering.kinds import KINDS
from turbolens_server.steering.masks import MAX_EDGE
from turbolens_server.unet.points import HookPoint

LabelsOf = Callable[[str], Mapping[int, str]]
"""The labels of an SAE, by feature."""
_LEAST_HALF: Final = np.float32(np.finfo(np.float16).smallest_subnormal)


class Packer:
    """Packs the features of one answer: labels, where asked for, go with the first of each SAE."""

    def __init__(self, request: ValidRequest, labels: LabelsOf) -> None:
        self._request = request
        self._labels = labels
        self._told: set[str] = set()

    def __call__(self, codes: SparseCodes) -> run_pb2.SparseFeatures:
        """Codes as a message.

        Raises:
            RpcError: FAILED_PRECONDITION where a value is past float16's range and float16 was asked for.
        """
        selection = self._request.selection
        if selection is None:
            raise AssertionError("features came that nobody asked for")
        packed = sparse_features(codes, selection)
        if selection.labels and codes.sae not in self._told:
            self._told.add(codes.sae)
            only = None if selection.only is None else selection.only[codes.sae]
            labels = self._labels(codes.sae)
            packed.labels.update({i: label for i, label in labels.items() if only is None or i in only})
        return packed

    def all_of(self, result: Result) -> list[run_pb2.SparseFeatures]:
        """Every SAE and step of a result, where features were asked for."""
        return [] if self._request.selection is None else [self(codes) for codes in result.features]


def sparse_features(codes: SparseCodes, selection: Selection) -> run_pb2.SparseFeatures:
    """Codes as a message, in the selection's type and with its features only.

    Raises:
        RpcError: FAILED_PRECONDITION where a value is past float16's range and float16 was asked for.
    """
    counts, indices, values = codes.counts, codes.indices, codes.values
    if selection.only is not None:
        wanted = np.fromiter(selection.only[codes.sae], np.int32)
        keep = np.isin(indices, wanted)
        position = np.repeat(np.arange(len(counts)), counts)
        counts = np.bincount(position[keep], minlength=len(counts)).astype(np.uint16)
        indices, values = indices[keep], values[keep]
    half = selection.value_type == run_pb2.VALUE_TYPE_FLOAT16
    largest = float(values.max(initial=0.0))
    if half and largest > float(np.finfo(np.float16).max):
        message = f"{codes.sae} has an activation of {largest:g}, past float16's range; ask for VALUE_TYPE_FLOAT32"
        raise RpcError(grpc.StatusCode.FAILED_PRECONDITION, message, "FLOAT16_OVERFLOW")
    if half:
        values = np.maximum(values, _LEAST_HALF)  # an active feature would round to 0, which says that it is not
    return run_pb2.SparseFeatures(
        sae=codes.sae,
        step=codes.step,
        height=codes.height,
        width=codes.width,
        d_sae=codes.d_sae,
        counts=counts.astype("<u2").tobytes(),
        indices=indices.astype("<u2" if codes.d_sae <= 2**16 else "<u4").tobytes(),
        values=values.astype("<f2" if half else "<f4").tobytes(),
        value_type=selection.value_type,
    )


def generation(result: Result, request: ValidRequest, pack: Packer | None = None) -> generation_service_pb2.Generation:
    """A picture and what was asked for beside it; features where there is a packer."""
    if result.picture is None:
        raise AssertionError("a request for pictures has pictures")
    return generation_service_pb2.Generation(
        seed=request.jobs[result.job].seed,
        prompt_index=request.prompt_index(result.job),
        image=image(result.picture, request),
        features=pack.all_of(result) if pack else [],
        latents=tensor(result.latents) if request.return_latents else None,
        batch_size=result.batch_size,
    )


def extraction(result: Result, request: ValidRequest, pack: Packer) -> feature_service_pb2.Extraction:
    """The features of one run."""
    return feature_service_pb2.Extraction(
        seed=request.jobs[result.job].seed,
        prompt_index=request.prompt_index(result.job),
        features=pack.all_of(result),
        batch_size=result.batch_size,
    )


def attribution(
    result: Result, request: ValidRequest, info: EngineInfo
) -> feature_service_pb2.AttributeFeatureResponse:
    """What made a feature fire; without the call's own fields."""
    (job,), found = request.jobs, result.attribution
    if found is None or job.attribute is None:
        raise AssertionError("what was asked for is attributed")
    grid = (found.height, found.width)
    return feature_service_pb2.AttributeFeatureResponse(
        seed=job.seed,
        step=job.attribute.step,
        height=found.height,
        width=found.width,
        pre=tensor(found.pre.reshape(grid)),
        activation=tensor(found.activation.reshape(grid)),
        bias=found.bias,
        by_source=tensor(found.by_source),
        by_head=tensor(found.by_head),
        tokens=found.tokens,
        provenance=provenance(request, info, [result]),
    )


def image(picture: npt.NDArray[np.uint8], request: ValidRequest) -> run_pb2.Image:
    """A picture in the format asked for."""
    return encode_image(picture, request.image_format, request.image_quality)


def tensor(values: npt.NDArray[np.float32]) -> run_pb2.Tensor:
    """A dense float32 array."""
    return run_pb2.Tensor(shape=values.shape, type=run_pb2.VALUE_TYPE_FLOAT32, data=values.astype("<f4").tobytes())


def provenance(request: ValidRequest, info: EngineInfo, results: Sequence[Result]) -> run_pb2.Provenance:
    """Everything needed to make results again, and what was chosen on the way."""
    return run_pb2.Provenance(
        run=request.run,
        model=_name_of(info.model),
        model_hash=info.model_hash,
        components_hash=info.components_hash,
        sae_hashes={name: info.saes[name].bundle.hash for name in info.saes if name in request.saes},
        forced_sae=any(info.saes[name].forced for name in request.saes),
        versions=info.versions,
        # Pictures of one request may have run in several batches, and what runs them may have changed between two.
        backend=", ".join(dict.fromkeys(result.backend for result in results if result.backend)) or info.backend,
        device=info.device,
        dtype=info.dtype,
        loras=_loras(info),
        chosen=[_chosen(what, request, result.job) for result in results for what in result.chosen],
        gate_hash=info.gate.bundle.hash if info.gate and request.run.gate else "",
        forced_gate=bool(info.gate and request.run.gate and info.gate.forced),
    )


def _chosen(chosen: Chosen, request: ValidRequest, job: int) -> run_pb2.ChosenFeatures:
    def scored(features: Sequence[ScoredFeature]) -> list[run_pb2.ScoredFeature]:
        return [
            run_pb2.ScoredFeature(feature=steering_pb2.FeatureRef(sae=f.sae, index=f.index), score=f.score)
            for f in features
        ]

    given, taken = scored(chosen.given), scored(chosen.taken)
    return run_pb2.ChosenFeatures(
        seed=request.jobs[job].seed, prompt_index=request.prompt_index(job), edit=chosen.edit, given=given, taken=taken
    )


def _loras(info: EngineInfo) -> list[run_pb2.Lora]:
    return [run_pb2.Lora(name=lora.name, weight=lora.weight, hash=lora.hash) for lora in info.loras]


def _name_of(place: str) -> str:
    """A model's name or hub id; of a folder only its own name: where an operator keeps things is nobody's business."""
    return Path(place).name if place.startswith(("/", ".", "~")) else place


def _without_places(value: Any) -> Any:
    """The same JSON, in which paths of files are their names."""
    if isinstance(value, dict):
        return {key: _without_places(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(part) for part in value]
    return _name_of(value) if isinstance(value, str) and value.startswith(("/", "~/", "./", "../")) else value


def saes(info: EngineInfo, labels: Mapping[str, int]) -> list[model_service_pb2.Sae]:
    """The SAEs served; `labels` counts the labelled features of each."""
    told = []
    for sae in info.saes.values():
        stats = sae.bundle.stats
        units = [steering_pb2.UNIT_RAW]
        units += [steering_pb2.UNIT_MEAN] if stats is not None else []
        units += [steering_pb2.UNIT_NORM] if sae.bundle.measured is not None else []
        units += [steering_pb2.UNIT_REFERENCE] if sae.bundle.steps is None else []
        told.append(
            model_service_pb2.Sae(
                name=sae.name,
                hook_point=sae.hook_point,
                architecture=sae.bundle.architecture,
                d_sae=sae.bundle.d_sae,
                k=sae.bundle.k or 0,
                hash=sae.bundle.hash,
                units=units,
                labels=labels.get(sae.name, 0),
                provenance_json=json.dumps(_without_places(sae.bundle.provenance)),
                forced=sae.forced,
                k_max=(sae.bundle.nesting.k_max or 0) if sae.bundle.nesting else 0,
                prefixes=sae.bundle.nesting.prefixes if sae.bundle.nesting else (),
                steps=sae.bundle.steps or 0,
            )
        )
    return told


def gate(served: GateInfo) -> model_service_pb2.Gate:
    """The learned region gates served."""
    return model_service_pb2.Gate(
        hash=served.bundle.hash,
        layers=served.gates.layers,
        threshold=served.bundle.threshold,
        closed=served.bundle.closed,
        provenance_json=json.dumps(_without_places(dict(served.bundle.provenance))),
        forced=served.forced,
    )


def model(
    info: EngineInfo, limits: RequestLimits, queue: QueueLimits, labels: dict[str, int]
) -> model_service_pb2.Model:
    """What is served; `labels` counts the labelled features of each SAE."""
    height, width = info.default_size

    def told(points: Sequence[HookPoint]) -> list[model_service_pb2.HookPoint]:
        grids = [point.grid(height, width) for point in points]
        return [
            model_service_pb2.HookPoint(name=p.name, module=p.module, d_model=p.d_model, height=rows, width=columns)
            for p, (rows, columns) in zip(points, grids, strict=True)
        ]

    return model_service_pb2.Model(
        name=_name_of(info.model),
        hash=info.model_hash,
        components_hash=info.components_hash,
        hook_points=told(info.hook_points),
        other_hook_points=told(info.other_points),
        saes=saes(info, labels),
        limits=model_service_pb2.Limits(
            max_prompt_chars=limits.max_prompt_chars,
            max_prompt_tokens=info.max_prompt_tokens,
            max_steps=info.max_steps,
            max_seeds=limits.max_seeds,
            max_edits=limits.max_edits,
            max_features_per_edit=limits.max_features_per_edit,
            max_strength=limits.max_strength,
            sizes=[model_service_pb2.Size(width=w, height=h) for h, w in info.sizes],
            max_mask_bytes=limits.max_mask_bytes,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_batch=queue.max_batch,
            max_queue=queue.max_queue,
            max_queue_pictures=queue.max_queue_pictures,
            max_request_id_chars=MAX_REQUEST_ID_CHARS,
            max_mask_shapes=limits.max_mask_shapes,
            max_mask_points=limits.max_mask_points,
            max_mask_pixels=limits.max_mask_pixels,
            max_mask_edge=MAX_EDGE,
            max_query_chars=MAX_QUERY_CHARS,
            max_filter_chars=MAX_CHARS,
            max_listed=MAX_LISTED,
            max_found=MAX_FOUND,
            max_request_features=limits.max_request_features,
            max_references=limits.max_references,
            max_request_bytes=MAX_REQUEST_BYTES,
            max_selected=limits.max_selected,
            max_saes=limits.max_saes,
            max_picture_bytes=limits.max_picture_bytes,
            max_guidance_scale=limits.max_guidance_scale if info.takes_guidance and limits.max_lanes > 1 else 0,
            max_regions=limits.max_regions if info.region_strides else 0,
        ),
        defaults=run_pb2.Sampling(steps=info.default_steps, width=width, height=height, guidance_scale=0.0),
        edit_kinds=list(KINDS),
        sources=["prompt", *(["picture"] if info.takes_pictures else []), "latents"],
        backend=info.backend,
        backend_reason=info.backend_reason,
        device=info.device,
        dtype=info.dtype,
        versions=info.versions,
        memory=model_service_pb2.Memory(
            weights_bytes=info.memory.weights,
            sae_bytes=info.memory.saes,
            activation_bytes=info.memory.activations,
            available_bytes=info.memory.available,
        ),
        load_seconds=info.load_s,
        scheduler=model_service_pb2.Scheduler(
            name=info.scheduler,
            timestep_spacing=info.timestep_spacing,
            previews=info.previews,
            takes_timesteps=info.takes_timesteps,
            train_timesteps=info.train_timesteps,
            timesteps=info.timesteps,
            embedded_guidance=info.embedded_guidance,
        ),
        loras=_loras(info),
        gate=gate(info.gate) if info.gate else None,
    )
