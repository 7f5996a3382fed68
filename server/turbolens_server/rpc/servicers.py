"""The three services: check, run, convert; nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import structlog

from turbolens_proto.v1 import (
    feature_service_pb2 as features,
)
from turbolens_proto.v1 import (
    feature_service_pb2_grpc,
    generation_service_pb2_grpc,
    model_service_pb2_grpc,
)
from turbolens_proto.v1 import (
    generation_service_pb2 as generation,
)
from turbolens_proto.v1 import (
    model_service_pb2 as models,
)
from turbolens_server.catalog.catalog import Catalog
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Event, FeaturesReady, Job, NotFinite, Result, StepDone
from turbolens_server.rpc import bulk, convert, questions, traces
from turbolens_server.rpc.admission import Account, bytes_of
from turbolens_server.rpc.calls import current_call, current_deadline, current_request_id
from turbolens_server.rpc.check_pool import CheckPool
from turbolens_server.rpc.errors import answer_too_large, loading, not_finite
from turbolens_server.rpc.queue import Queue
from turbolens_server.rpc.tickets import Queued
from turbolens_server.rpc.transport import MAX_MESSAGE_BYTES
from turbolens_server.rpc.validation import (
    RequestLimits,
    ValidRequest,
    validate_attribute,
    validate_extract,
    validate_generate,
)
from turbolens_server.rpc.warnings import warnings

T = TypeVar("T")
Context: TypeAlias = Any
"""grpc.aio.ServicerContext; grpcio ships no types."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """What serves requests once the model is loaded: each keeps that which it was let in with."""

    engine: Engine
    queue: Queue
    catalog: Catalog

    async def run(self, jobs: Sequence[Job]) -> list[Result]:
        """The current call's jobs to their end."""
        return await self.queue.run(jobs, current_deadline(), current_call().caller.name, self.engine)

    def stream(self, jobs: Sequence[Job]) -> AsyncGenerator[Queued | Event, None]:
        """The current call's jobs as they go."""
        return self.queue.stream(jobs, current_deadline(), current_call().caller.name, self.engine)


class Readiness:
    """Where the servicers find what serves; empty while the model loads."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self.checks = CheckPool()
        self.ready: Ready | None = None

    def get(self) -> Ready:
        """What serves.

        Raises:
            RpcError: UNAVAILABLE while the model loads.
        """
        if self.ready is None:
            raise loading()
        return self.ready

    async def valid(self, ready: Ready, check: Callable[..., ValidRequest], request: Any) -> ValidRequest:
        """A checked request, whose results there is room for.

        The call's line in the log says how many pictures it is for.

        Raises:
            RpcError: INVALID_ARGUMENT where it cannot be served, RESOURCE_EXHAUSTED where there is no room.
        """
        info = ready.engine.info
        valid = await self.checks.run(check, request, info, self.limits)
        structlog.contextvars.bind_contextvars(pictures=len(valid.jobs))
        current_call().account.hold_answer(bytes_of(valid.jobs, info), len(valid.jobs))
        return valid


async def _off_loop(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Image coding and packing take milliseconds that the event loop does not have."""
    return await asyncio.to_thread(function, *arguments, **options)


async def _coded(ready: Ready, function: Callable[..., T], *arguments: Any) -> T:
    """What is made of one picture or its features for an answer."""
    with traces.stage("coding"), ready.queue.metrics.stage_seconds.labels("coding").time():
        return await _off_loop(function, *arguments)


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """`turbolens.v1.ModelService`."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness

    async def GetModel(self, request: models.GetModelRequest, context: Context) -> models.GetModelResponse:  # noqa: N802
        ready = self._readiness.get()
        model = convert.model(
            ready.engine.info, self._readiness.limits, ready.queue.limits, ready.catalog.label_counts()
        )
        return models.GetModelResponse(model=model)


class GenerationServicer(generation_service_pb2_grpc.GenerationServiceServicer):
    """`turbolens.v1.GenerationService`."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness

    async def Generate(self, request: generation.GenerateRequest, context: Context) -> generation.GenerateResponse:  # noqa: N802
        ready = self._readiness.get()
        valid = await self._readiness.valid(ready, validate_generate, request)
        results = await ready.run(valid.jobs)
        pack = convert.Packer(valid, ready.catalog.labels_of)
        made = [await _coded(ready, convert.generation, result, valid, pack) for result in results]
        return _one_message(
            generation.GenerateResponse(
                request_id=current_request_id(),
                generations=made,
                provenance=convert.provenance(valid, ready.engine.info, results),
                warnings=warnings(valid.jobs, results, ready.engine.info),
            )
        )

    async def StreamGenerate(  # noqa: N802
        self, request: generation.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[generation.StreamGenerateResponse]:
        ready = self._readiness.get()
        valid = await self._readiness.valid(ready, validate_generate, request)
        pack = convert.Packer(valid, ready.catalog.labels_of)
        answer = generation.StreamGenerateResponse
        results: list[Result] = []
        failed: list[NotFinite] = []
        async with contextlib.aclosing(ready.stream(valid.jobs)) as events:
            async for event in events:
                match event:
                    case Queued(position):
                        yield answer(queued=features.QueuedEvent(request_id=current_request_id(), position=position))
                    case StepDone(job, step, steps, preview=preview):
                        coded = None if preview is None else await _coded(ready, convert.image, preview, valid)
                        yield answer(step=generation.StepEvent(seed_index=job, step=step, steps=steps, preview=coded))
                    case FeaturesReady():
                        yield answer(features=await _coded(ready, _features_event, event, valid, pack))
                    case Result():
                        results.append(event)
                        made = await _coded(ready, convert.generation, event, valid)
                        yield answer(picture=generation.PictureEvent(seed_index=event.job, generation=made))
                    case NotFinite():
                        failed.append(event)
        _check_finite(failed, valid)
        yield answer(done=_done(valid, results, ready))


class FeatureServicer(feature_service_pb2_grpc.FeatureServiceServicer):
    """`turbolens.v1.FeatureService`."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness

    async def ExtractFeatures(  # noqa: N802
        self, request: features.ExtractFeaturesRequest, context: Context
    ) -> features.ExtractFeaturesResponse:
        ready = self._readiness.get()
        return await self._extract(ready, await self._readiness.valid(ready, validate_extract, request))

    async def _extract(self, ready: Ready, valid: ValidRequest) -> features.ExtractFeaturesResponse:
        results = await ready.run(valid.jobs)
        pack = convert.Packer(valid, ready.catalog.labels_of)
        return _one_message(
            features.ExtractFeaturesResponse(
                request_id=current_request_id(),
                extractions=[await _coded(ready, convert.extraction, result, valid, pack) for result in results],
                provenance=convert.provenance(valid, ready.engine.info, results),
                warnings=warnings(valid.jobs, results, ready.engine.info),
            )
        )

    async def AttributeFeature(  # noqa: N802
        self, request: features.AttributeFeatureRequest, context: Context
    ) -> features.AttributeFeatureResponse:
        ready = self._readiness.get()
        valid = await self._readiness.valid(ready, validate_attribute, request)
        results = await ready.run(valid.jobs)
        info = ready.engine.info
        answer = await _coded(ready, convert.attribution, results[0], valid, info)
        answer.request_id = current_request_id()
        answer.warnings.extend(warnings(valid.jobs, results, info))
        return _one_message(answer)

    async def StreamFeatures(  # noqa: N802
        self, request: features.StreamFeaturesRequest, context: Context
    ) -> AsyncIterator[features.StreamFeaturesResponse]:
        ready = self._readiness.get()
        valid = await self._readiness.valid(ready, validate_extract, request)
        pack = convert.Packer(valid, ready.catalog.labels_of)
        answer = features.StreamFeaturesResponse
        results: list[Result] = []
        failed: list[NotFinite] = []
        async with contextlib.aclosing(ready.stream(valid.jobs)) as events:
            async for event in events:
                match event:
                    case Queued(position):
                        yield answer(queued=features.QueuedEvent(request_id=current_request_id(), position=position))
                    case FeaturesReady():
                        yield answer(features=await _coded(ready, _features_event, event, valid, pack))
                    case Result():
                        results.append(event)
                    case NotFinite():
                        failed.append(event)
                    case StepDone():
                        pass
        _check_finite(failed, valid)
        yield answer(done=_done(valid, results, ready))

    async def ExtractFeaturesBatch(  # type: ignore[override]  # noqa: N802  # each arrives with its account
        self, arrivals: bulk.Arrivals, context: Context
    ) -> AsyncIterator[features.ExtractFeaturesBatchResponse]:
        ready = self._readiness.get()
        pictures = 0

        async def serve(request: features.ExtractFeaturesRequest, account: Account) -> features.ExtractFeaturesResponse:
            nonlocal pictures
            check = functools.partial(
                self._readiness.checks.run, validate_extract, request, ready.engine.info, self._readiness.limits
            )
            valid = await bulk.when_there_is_room(check)
            size = bytes_of(valid.jobs, ready.engine.info)
            await bulk.when_there_is_room(functools.partial(_hold, account, size, len(valid.jobs)))
            pictures += len(valid.jobs)
            return await bulk.when_there_is_room(functools.partial(self._extract, ready, valid))

        async def run(item: bulk.Item, account: Account) -> bulk.Answer:
            return await bulk.answer_one(item, serve(item.request, account))

        most = bulk.window(ready.queue.limits)
        async with contextlib.aclosing(bulk.answer_all(arrivals, run, most)) as answers:
            async for answer in answers:
                yield answer
        structlog.contextvars.bind_contextvars(pictures=pictures)

    async def ListFeatures(  # noqa: N802
        self, request: features.ListFeaturesRequest, context: Context
    ) -> features.ListFeaturesResponse:
        return await _off_loop(questions.list_features, self._readiness.get().catalog, request)

    async def GetFeature(  # noqa: N802
        self, request: features.GetFeatureRequest, context: Context
    ) -> features.GetFeatureResponse:
        return questions.get_feature(self._readiness.get().catalog, request)

    async def SearchFeatures(  # noqa: N802
        self, request: features.SearchFeaturesRequest, context: Context
    ) -> features.SearchFeaturesResponse:
        ready = self._readiness.get()
        questions.check_search(request, ready.catalog.saes)
        query = request.query.strip()
        embedded = await ready.queue.embed(query)
        return await _off_loop(questions.search, ready.catalog, request, embedded)

    async def NearestFeatures(  # noqa: N802
        self, request: features.NearestFeaturesRequest, context: Context
    ) -> features.NearestFeaturesResponse:
        return await _off_loop(questions.nearest, self._readiness.get().catalog, request)


async def _hold(account: Account, count: int, pictures: int) -> None:
    account.hold_answer(count, pictures)


def _one_message(answer: T) -> T:
    """An answer that one message can hold; how far coded pictures and features shrink is not known before.

    Raises:
        RpcError: RESOURCE_EXHAUSTED where it is larger.
    """
    if (size := answer.ByteSize()) > MAX_MESSAGE_BYTES:  # type: ignore[attr-defined]
        raise answer_too_large(size, MAX_MESSAGE_BYTES)
    return answer


def _features_event(event: FeaturesReady, valid: ValidRequest, pack: convert.Packer) -> features.FeaturesEvent:
    return features.FeaturesEvent(
        seed_index=event.job,
        seed=valid.jobs[event.job].seed,
        features=pack(event.codes),
    )


def _check_finite(failed: list[NotFinite], valid: ValidRequest) -> None:
    """A stream in which pictures failed ends with the first one's error, after all the others."""
    if failed:
        raise not_finite(failed[0], valid.jobs[failed[0].job].seed)


def _done(valid: ValidRequest, results: list[Result], ready: Ready) -> features.DoneEvent:
    info = ready.engine.info
    return features.DoneEvent(
        provenance=convert.provenance(valid, info, results), warnings=warnings(valid.jobs, results, info)
    )
