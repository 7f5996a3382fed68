"""The sync client. Made from `_async.py` by `tools/unasync.py`: edit there only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Unpack, overload

import grpc

from turbolens._channel import TLS, sync_channel
from turbolens._edits import Edit, FeatureLike, to_ref
from turbolens._embedded import EmbeddedServer, start_embedded
from turbolens._errors import TurboLensError, from_rpc_error
from turbolens._features import Feature, Match, Table
from turbolens._numbers import whole
from turbolens._requests import (
    ExtractOptions,
    GenerateOptions,
    ImageFormat,
    Only,
    PerSae,
    Selection,
    extract_request,
    generate_request,
    one_or_many,
)
from turbolens._results import Event, Extraction, Picture, Pictures, event_of, warnings_of
from turbolens_proto.v1 import (
    feature_service_pb2,
    feature_service_pb2_grpc,
    generation_service_pb2,
    generation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    run_pb2,
)


class Lens:
    """A connection to a TurboLens server; made by :func:`turbolens.connect`."""

    def __init__(
        self, target: str, *, tls: TLS | None = None, timeout: float = 60.0, embedded: EmbeddedServer | None = None
    ) -> None:
        self._target = target
        self._timeout = timeout
        self._embedded = embedded
        self._channel = sync_channel(target, tls)
        self._models: Any = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._features: Any = feature_service_pb2_grpc.FeatureServiceStub(self._channel)
        self._generation: Any = generation_service_pb2_grpc.GenerationServiceStub(self._channel)
        self._model: model_service_pb2.Model | None = None
        self._labels: dict[str, dict[int, str]] = {}

    def model(self) -> model_service_pb2.Model:
        """The model, its hook points and SAEs, and every limit; asked once."""
        if self._model is None:
            answer = self._call(self._models.GetModel, model_service_pb2.GetModelRequest(), None)
            self._model = answer.model
        return self._model

    @overload
    def generate(self, prompt: str, *, seed: int | None = None, **options: Unpack[GenerateOptions]) -> Picture: ...

    @overload
    def generate(self, prompt: str, *, seeds: Sequence[int], **options: Unpack[GenerateOptions]) -> Pictures: ...

    def generate(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        steer: Sequence[Edit] = (),
        features: Selection = None,
        only: Only = None,
        float32: bool = False,
        k: PerSae = None,
        prefix: PerSae = None,
        format: ImageFormat = "png",
        quality: int | None = None,
        latents: bool = False,
        timeout: float | None = None,
        request_id: str = "",
    ) -> Any:
        """Make a picture, or one for each of several seeds.

        Args:
            prompt: any text; the empty prompt is one.
            seed: of one picture; None: the server draws one and the result says which.
            seeds: of several pictures.
            steps: denoising steps; None: the server's default.
            width: pixels; None: the server's default.
            height: pixels; None: the server's default.
            steer: edits, such as `add(match, 8, mask=box(0, 0, .5, 1))`.
            features: features to return: True for all, or SAEs by name.
            only: of these, only the ones named, one or several; without `features`, from the SAEs that they belong to.
            float32: return activations in float32; float16 holds none above 65,504, where the call fails.
            k: features active at a position, by SAE, where it allows other than its own: `{"up.0.1": 4}`.
            prefix: so many first features alone exist, by SAE, where it allows that: `{"up.0.1": 64}`.
            format: "png", "jpeg", "webp" or "raw".
            quality: of JPEG and WebP, 1 to 100.
            latents: return the final latent too.
            timeout: seconds; None: the connection's.
            request_id: for the server's log; empty: the server makes one.

        Returns:
            A :class:`Picture`; :class:`Pictures`, in order, where `seeds` was given.

        Raises:
            InvalidRequest: with a violation for every field that cannot be served.
            TurboLensError: anything else that went wrong.
        """
        request = generate_request(
            prompt, seeds=one_or_many(seed, seeds), steps=steps, width=width, height=height, steer=steer,
            features=features, only=only, float32=float32, k=k, prefix=prefix, format=format, quality=quality,
            latents=latents, request_id=request_id,
        )  # fmt: skip
        answer = self._call(self._generation.Generate, request, timeout)
        labels = self._labels_of(chunk.sae for made in answer.generations for chunk in made.features)
        warnings = warnings_of(answer.warnings)
        made = [Picture(g, prompt, answer.provenance, warnings, labels) for g in answer.generations]
        return Pictures(made) if seeds is not None else made[0]

    @overload
    def extract(self, prompt: str, *, seed: int | None = None, **options: Unpack[ExtractOptions]) -> Extraction: ...

    @overload
    def extract(self, prompt: str, *, seeds: Sequence[int], **options: Unpack[ExtractOptions]) -> list[Extraction]: ...

    def extract(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        steer: Sequence[Edit] = (),
        saes: Sequence[str] | None = None,
        only: Only = None,
        float32: bool = False,
        k: PerSae = None,
        prefix: PerSae = None,
        timeout: float | None = None,
        request_id: str = "",
    ) -> Any:
        """The features of a run, without its picture; arguments as for :meth:`generate`.

        Without `saes`, the names of the SAEs, and without `only`, all features come.

        The first time that features of an SAE come back, its labels are fetched too, and kept for the connection.

        Returns:
            An :class:`Extraction`; a list of them, in order, where `seeds` was given.

        Raises:
            InvalidRequest: with a violation for every field that cannot be served.
            TurboLensError: anything else that went wrong.
        """
        request = extract_request(
            prompt, seeds=one_or_many(seed, seeds), steps=steps, width=width, height=height, steer=steer,
            saes=saes, only=only, float32=float32, k=k, prefix=prefix, request_id=request_id,
        )  # fmt: skip
        answer = self._call(self._features.ExtractFeatures, request, timeout)
        labels = self._labels_of(chunk.sae for made in answer.extractions for chunk in made.features)
        warnings = warnings_of(answer.warnings)
        made = [Extraction(e, prompt, answer.provenance, warnings, labels) for e in answer.extractions]
        return made if seeds is not None else made[0]

    def stream_generate(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        steer: Sequence[Edit] = (),
        features: Selection = None,
        only: Only = None,
        float32: bool = False,
        k: PerSae = None,
        prefix: PerSae = None,
        format: ImageFormat = "png",
        quality: int | None = None,
        latents: bool = False,
        previews: bool = False,
        timeout: float | None = None,
        request_id: str = "",
    ) -> Iterator[Event]:
        """Make pictures and hear of every step: Queued, Step, Features, PictureReady, Done.

        Arguments as for :meth:`generate`; `previews` decodes a preview at every step but the last. Leaving the loop
        early cancels the run.
        """
        request = generate_request(
            prompt, seeds=one_or_many(seed, seeds), steps=steps, width=width, height=height, steer=steer,
            features=features, only=only, float32=float32, k=k, prefix=prefix, format=format, quality=quality,
            latents=latents, request_id=request_id,
        )  # fmt: skip
        labels = self._labels_of(self._selected(request.features if request.HasField("features") else None))
        stream = generation_service_pb2.StreamGenerateRequest(request=request, previews=previews)
        for message in self._stream(self._generation.StreamGenerate, stream, timeout):
            yield event_of(message, prompt, labels)

    def stream_features(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        steer: Sequence[Edit] = (),
        saes: Sequence[str] | None = None,
        only: Only = None,
        float32: bool = False,
        k: PerSae = None,
        prefix: PerSae = None,
        timeout: float | None = None,
        request_id: str = "",
    ) -> Iterator[Event]:
        """The features of a run as they are computed: Queued, Features, Done. Arguments as for :meth:`extract`."""
        request = extract_request(
            prompt, seeds=one_or_many(seed, seeds), steps=steps, width=width, height=height, steer=steer,
            saes=saes, only=only, float32=float32, k=k, prefix=prefix, request_id=request_id,
        )  # fmt: skip
        labels = self._labels_of(self._selected(request.features))
        stream = feature_service_pb2.StreamFeaturesRequest(request=request)
        for message in self._stream(self._features.StreamFeatures, stream, timeout):
            yield event_of(message, prompt, labels)

    def search_features(self, query: str, *, block: str | None = None, limit: int = 10) -> Table:
        """Features for words, best first; each goes straight into an edit.

        Args:
            query: a word or a few.
            block: only this SAE; None: all.
            limit: at most so many, up to 100.

        Returns:
            A list of :class:`Match`.
        """
        request = feature_service_pb2.SearchFeaturesRequest(
            query=query, saes=[block] if block else [], page_size=whole(limit, "limit")
        )
        answer = self._call(self._features.SearchFeatures, request, None)
        matches = [Match(Feature.from_proto(m.feature), m.score, m.reason) for m in answer.matches]
        return Table(matches, ("ref", "feature.label", "score", "reason"))

    def get_feature(self, feature: FeatureLike, index: int | None = None) -> Feature:
        """What is known of one feature, top examples included: `get_feature("up.0.1", 202)`, or any form of a feature.

        Raises:
            NotFound: there is no such SAE or feature.
        """
        ref = to_ref(feature if index is None else (str(feature), index))
        request = feature_service_pb2.GetFeatureRequest(name=f"saes/{ref.sae}/features/{ref.index}")
        answer = self._call(self._features.GetFeature, request, None)
        return Feature.from_proto(answer.feature)

    def list_features(self, sae: str, *, filter: str = "", order_by: str = "") -> Iterator[Feature]:
        """Every feature of an SAE that matches, page by page.

        Args:
            sae: its name.
            filter: comparisons joined by AND, such as `attribute = "color" AND frequency > 0.01`.
            order_by: fields with an optional "desc", such as `frequency desc, index`.
        """
        token = ""
        while True:
            request = feature_service_pb2.ListFeaturesRequest(
                parent=f"saes/{sae}", page_size=1000, page_token=token, filter=filter, order_by=order_by
            )
            answer = self._call(self._features.ListFeatures, request, None)
            for message in answer.features:
                yield Feature.from_proto(message)
            token = answer.next_page_token
            if not token:
                return

    def close(self) -> None:
        """Close the connection, and the server that was started for it."""
        self._channel.close()
        if self._embedded is not None:
            self._embedded.close()
            self._embedded = None

    def __enter__(self) -> Lens:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Lens({self._target!r})"

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return method(request, timeout=self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target) from None

    def _stream(self, method: Any, request: Any, timeout: float | None) -> Iterator[Any]:
        call = method(request, timeout=self._timeout if timeout is None else timeout)
        try:
            for message in call:
                yield message
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target) from None
        finally:
            call.cancel()

    def _selected(self, selection: run_pb2.FeatureSelection | None) -> Sequence[str]:
        """The names of the SAEs whose features come back."""
        if selection is None:
            return ()
        return selection.saes or [sae.name for sae in (self.model()).saes]

    def _labels_of(self, saes: Any) -> dict[str, dict[int, str]]:
        """Labels of SAEs, fetched once for each and kept.

        Features without their labels are worth more than none: where labels cannot be had, those are empty, and the
        next call asks again.
        """
        for sae in dict.fromkeys(saes):
            if sae not in self._labels:
                found = {}
                try:
                    for known in self.list_features(sae, filter='label != ""'):
                        found[known.ref.index] = known.label
                except TurboLensError:
                    continue
                self._labels[sae] = found
        return self._labels


def connect(target: str = "localhost:50051", *, tls: TLS | None = None, timeout: float = 60.0, **settings: Any) -> Lens:
    """Connect to a server, or start one in this process.

    Args:
        target: "host:port", or "embedded" for a server of its own in this process.
        tls: for a server behind TLS.
        timeout: seconds that a call may take, unless it says otherwise.
        settings: of the embedded server, such as `model` or `sae`.
    """
    if target == "embedded":
        embedded = start_embedded(settings)
        return Lens(embedded.target, timeout=timeout, embedded=embedded)
    if settings:
        raise TypeError(f"{', '.join(settings)}: only an embedded server takes settings")
    return Lens(target, tls=tls, timeout=timeout)
