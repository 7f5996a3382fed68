"""A small TurboLens server without a model: canned but well-formed answers over a real socket."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from PIL import Image

from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_proto.v1 import feature_service_pb2_grpc, generation_service_pb2_grpc, model_service_pb2_grpc
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import model_service_pb2 as ms
from turbolens_proto.v1 import run_pb2 as run
from turbolens_proto.v1 import steering_pb2 as steering

SAES = ("down.2.1", "up.0.1")
D_SAE, HEIGHT, WIDTH = 16, 2, 3
LABELS = {1: "blue", 2: "<b>star</b>", 5: "night"}


def pack(dense: np.ndarray, sae: str = "up.0.1", step: int = 0, wide: bool = False) -> run.SparseFeatures:
    """Activations [height, width, d_sae] as the contract packs them; `wide`: float32 values."""
    height, width, d_sae = dense.shape
    position, index = np.nonzero(dense.reshape(-1, d_sae))
    counts = np.bincount(position, minlength=height * width)
    return run.SparseFeatures(
        sae=sae,
        step=step,
        height=height,
        width=width,
        d_sae=d_sae,
        counts=counts.astype("<u2").tobytes(),
        indices=index.astype("<u2" if d_sae <= 65536 else "<u4").tobytes(),
        values=dense.reshape(-1, d_sae)[position, index].astype("<f4" if wide else "<f2").tobytes(),
        value_type=run.VALUE_TYPE_FLOAT32 if wide else run.VALUE_TYPE_FLOAT16,
    )


def activations(seed: int, step: int) -> np.ndarray:
    """What fires in a run, [height, width, d_sae]: multiples of 1/8, which float16 holds exactly."""
    rng = np.random.default_rng([seed, step])
    dense = rng.integers(1, 64, (HEIGHT, WIDTH, D_SAE)) / 8
    return np.where(rng.random(dense.shape) < 0.3, dense, 0)


def pixels(seed: int) -> np.ndarray:
    """The picture of a seed, [8, 8, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)


def an_image(seed: int, format: int) -> run.Image:
    array, kind = pixels(seed), format or run.IMAGE_FORMAT_PNG
    if kind == run.IMAGE_FORMAT_RAW:
        return run.Image(format=kind, data=array.tobytes(), width=8, height=8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, run.ImageFormat.Name(kind).removeprefix("IMAGE_FORMAT_"))
    return run.Image(format=kind, data=file.getvalue(), width=8, height=8)


def a_feature(sae: str, index: int) -> fs.Feature:
    label = LABELS.get(index, "")
    measured = [fs.FeatureLabel(attribute="color", value=label, region="thing", score=0.9)] if label else []
    return fs.Feature(
        name=f"saes/{sae}/features/{index}",
        ref=steering.FeatureRef(sae=sae, index=index),
        label=label,
        label_score=0.9 if label else 0,
        frequency=0.25,
        mean=1.5,
        max=4,
        labels=measured,
    )


EXAMPLE = fs.FeatureExample(prompt="a blue star", seed=9, steps=2, step=1, y=1, x=2, activation=3.5)


def refuse(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    message: str,
    *details: Any,
    request_id: str = "made-by-server",
) -> None:
    """End a call as the server does: google.rpc.Status with details, and the request id."""
    packed = []
    for detail in details:
        one = any_pb2.Any()
        one.Pack(detail)
        packed.append(one)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    context.set_trailing_metadata(
        (("grpc-status-details-bin", status.SerializeToString()), ("x-request-id", request_id))
    )
    context.abort(code, message)


class Fake(
    model_service_pb2_grpc.ModelServiceServicer,
    feature_service_pb2_grpc.FeatureServiceServicer,
    generation_service_pb2_grpc.GenerationServiceServicer,
):
    """The servicer. `requests` keeps what came; `on[method]` runs before the answer and may abort."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: tuple[tuple[str, Any], ...] = ()
        self.on: dict[str, Callable[[grpc.ServicerContext], None]] = {}
        self.page = 7
        self.versions: dict[str, str] = {}
        self.cancelled = threading.Event()

    def last(self, kind: type) -> Any:
        """The newest request of a kind."""
        return next(request for request in reversed(self.requests) if isinstance(request, kind))

    def _came(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata = tuple((key, value) for key, value in context.invocation_metadata())
        self.on.get(method, lambda _: None)(context)

    @staticmethod
    def _seeds(request: Any) -> list[int]:
        return list(request.run.seeds) or [4242]

    @staticmethod
    def _account(request: Any) -> run.Provenance:
        return run.Provenance(model="fake", run=request.run)

    def _features(self, request: Any, seed: int) -> list[run.SparseFeatures]:
        asked = request.run
        if isinstance(request, gs.GenerateRequest | gs.StreamGenerateRequest) and not asked.HasField("features"):
            return []
        saes = list(asked.features.saes) or SAES
        wide = asked.features.value_type == run.VALUE_TYPE_FLOAT32
        steps = range(asked.sampling.steps or 1)
        chunks = [pack(activations(seed, step), sae, step, wide) for step in steps for sae in saes]
        if asked.features.labels and seed == self._seeds(request)[0]:
            for chunk in chunks[: len(saes)]:
                chunk.labels.update(LABELS)
        return chunks

    def GetModel(self, request, context):  # noqa: N802
        self._came("GetModel", request, context)
        saes = [ms.Sae(name=name, hook_point=name, d_sae=D_SAE) for name in SAES]
        return ms.GetModelResponse(
            model=ms.Model(name="fake", device="cpu", dtype="float32", saes=saes, versions=self.versions)
        )

    def Generate(self, request, context):  # noqa: N802
        self._came("Generate", request, context)
        if request.run.source.prompt.text.startswith("bad"):
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "is bad")
        made = [self._generation(request, seed) for seed in self._seeds(request)]
        warnings = [run.Warning(code="PROMPT_CUT", message="cut")] if len(request.run.source.prompt.text) > 50 else []
        return gs.GenerateResponse(
            request_id=request.request_id or "made", generations=made, provenance=self._account(request),
            warnings=warnings,
        )  # fmt: skip

    def _generation(self, request, seed):
        made = gs.Generation(
            seed=seed, image=an_image(seed, request.image.format), features=self._features(request, seed)
        )
        if request.return_latents:
            latents = np.arange(16, dtype="<f4")
            made.latents.CopyFrom(run.Tensor(shape=[4, 2, 2], type=run.VALUE_TYPE_FLOAT32, data=latents.tobytes()))
        return made

    def StreamGenerate(self, request, context):  # noqa: N802
        context.add_callback(self.cancelled.set)
        self._came("StreamGenerate", request, context)
        answer = gs.StreamGenerateResponse
        yield answer(queued=fs.QueuedEvent(request_id=request.request_id, position=2))
        steps = request.run.sampling.steps or 1
        for at, seed in enumerate(self._seeds(request)):
            chunks = self._features(request, seed)
            for step in range(steps):
                preview = an_image(seed, 0) if request.previews and step < steps - 1 else None
                yield answer(step=gs.StepEvent(seed_index=at, step=step, steps=steps, preview=preview))
                for chunk in chunks:
                    if chunk.step == step:
                        yield answer(features=fs.FeaturesEvent(seed_index=at, seed=seed, features=chunk))
            made = self._generation(request, seed)
            del made.features[:]
            yield answer(picture=gs.PictureEvent(seed_index=at, generation=made))
        yield answer(done=fs.DoneEvent(provenance=self._account(request)))

    def ExtractFeatures(self, request, context):  # noqa: N802
        self._came("ExtractFeatures", request, context)
        made = [fs.Extraction(seed=seed, features=self._features(request, seed)) for seed in self._seeds(request)]
        return fs.ExtractFeaturesResponse(extractions=made, provenance=self._account(request))

    def ExtractFeaturesBatch(self, requests, context):  # noqa: N802
        self._came("ExtractFeaturesBatch", None, context)
        for item in requests:
            self.on.get("item", lambda _: None)(item)
            answer = fs.ExtractFeaturesBatchResponse(item=item.item)
            request = item.request
            if request.run.source.prompt.text.startswith("bad"):
                field = fs.FieldViolation(field="run.source.prompt.text", description="is bad")
                answer.error.MergeFrom(fs.ItemError(code=3, message="is bad", violations=[field]))
            else:
                made = [fs.Extraction(seed=s, features=self._features(request, s)) for s in self._seeds(request)]
                answer.response.MergeFrom(
                    fs.ExtractFeaturesResponse(extractions=made, provenance=self._account(request))
                )
            yield answer

    def StreamFeatures(self, request, context):  # noqa: N802
        self._came("StreamFeatures", request, context)
        yield fs.StreamFeaturesResponse(queued=fs.QueuedEvent(position=0))
        for at, seed in enumerate(self._seeds(request)):
            for chunk in self._features(request, seed):
                event = fs.FeaturesEvent(seed_index=at, seed=seed, features=chunk)
                yield fs.StreamFeaturesResponse(features=event)
        yield fs.StreamFeaturesResponse(done=fs.DoneEvent(provenance=self._account(request)))

    def ListFeatures(self, request, context):  # noqa: N802
        self._came("ListFeatures", request, context)
        sae = request.parent.removeprefix("saes/")
        every = [a_feature(sae, i) for i in range(D_SAE)]
        if request.filter == 'label != ""':
            every = [feature for feature in every if feature.label]
        start = int(request.page_token or 0)
        size = min(request.page_size or 100, self.page)
        token = str(start + size) if start + size < len(every) else ""
        return fs.ListFeaturesResponse(
            features=every[start : start + size], next_page_token=token, total_size=len(every)
        )

    def GetFeature(self, request, context):  # noqa: N802
        self._came("GetFeature", request, context)
        sae, _, index = request.name.removeprefix("saes/").partition("/features/")
        if sae not in SAES or int(index) >= D_SAE:
            info = error_details_pb2.ErrorInfo(reason="FEATURE_NOT_FOUND", domain="turbolens")
            refuse(context, grpc.StatusCode.NOT_FOUND, f"{sae} has features 0 to {D_SAE - 1}, not {index}", info)
        feature = a_feature(sae, int(index))
        feature.examples.append(EXAMPLE)
        return fs.GetFeatureResponse(feature=feature)

    def SearchFeatures(self, request, context):  # noqa: N802
        self._came("SearchFeatures", request, context)
        found = [
            fs.FeatureMatch(feature=a_feature(sae, index), score=0.8, reason=f"color={label}: word")
            for sae in (list(request.saes) or SAES)
            for index, label in LABELS.items()
            if request.query in label
        ]
        return fs.SearchFeaturesResponse(matches=found)


class Running:
    """A fake server on a port of its own."""

    def __init__(self) -> None:
        self.fake = Fake()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", 16 * 2**20)]
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self.fake, self._server)
        feature_service_pb2_grpc.add_FeatureServiceServicer_to_server(self.fake, self._server)
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(self.fake, self._server)
        self.target = f"localhost:{self._server.add_insecure_port('localhost:0')}"
        self.closed = 0
        self._server.start()

    def close(self) -> None:
        """Stop it."""
        self.closed += 1
        self._server.stop(0)
