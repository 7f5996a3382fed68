"""The requests whole: what can be served, ready to run."""

from __future__ import annotations

import dataclasses

from turbolens_proto.v1 import feature_service_pb2, generation_service_pb2, run_pb2
from turbolens_server.engine.choosing import OWN
from turbolens_server.engine.info import EngineInfo
from turbolens_server.engine.types import Job, Reference
from turbolens_server.rpc.validation.answer import check_answer
from turbolens_server.rpc.validation.attributions import check_attribute
from turbolens_server.rpc.validation.bounds import check_bounds
from turbolens_server.rpc.validation.checks import MAX_REQUEST_ID_CHARS, Checks, RequestLimits
from turbolens_server.rpc.validation.choices import chooses
from turbolens_server.rpc.validation.edits import EditChecks, saes_edited
from turbolens_server.rpc.validation.masks import MaskChecks
from turbolens_server.rpc.validation.regions import check_gate, check_regions
from turbolens_server.rpc.validation.runs import (
    Beside,
    check_lanes,
    check_prompts,
    check_references,
    check_sampling,
    check_seeds,
)
from turbolens_server.rpc.validation.selection import Selection, check_sae_options, check_selection, check_steps_of
from turbolens_server.rpc.validation.sources import check_source, check_taken

GenerateLike = generation_service_pb2.GenerateRequest | generation_service_pb2.StreamGenerateRequest
ExtractLike = feature_service_pb2.ExtractFeaturesRequest | feature_service_pb2.StreamFeaturesRequest


@dataclasses.dataclass(frozen=True)
class ValidRequest:
    """A request that can be served."""

    run: run_pb2.Run
    """As received, with its seeds and every default filled in."""
    jobs: tuple[Job, ...]
    """One for each prompt and seed, prompt by prompt."""
    selection: Selection | None
    saes: frozenset[str]
    """SAEs that take part, in what comes back or in edits."""
    image_format: run_pb2.ImageFormat.ValueType = run_pb2.IMAGE_FORMAT_PNG
    image_quality: int = 90
    return_latents: bool = False

    def prompt_index(self, job: int) -> int:
        """Which of the run's prompts a job hears."""
        return job // len(self.run.seeds)


def validate_generate(request: GenerateLike, info: EngineInfo, limits: RequestLimits) -> ValidRequest:
    """A request for pictures, ready to run.

    Raises:
        RpcError: INVALID_ARGUMENT with a violation for every field that is wrong.
    """
    checks = Checks(info, limits)
    check_bounds(checks, "run", request.run)
    previews = isinstance(request, generation_service_pb2.StreamGenerateRequest) and request.previews
    if previews and not info.previews:
        checks.wrong("previews", f"the scheduler {info.scheduler} has no estimate of the picture before its last step")
    _check_request_id(checks, request.request_id)
    valid = _run(checks, request.run, picture=True, previews=previews)
    kind, quality = _image(checks, request.image)
    checks.refuse()
    if isinstance(request, generation_service_pb2.GenerateRequest):
        raw = kind == run_pb2.IMAGE_FORMAT_RAW
        check_answer(checks, valid.jobs, valid.selection, raw=raw, latents=request.return_latents)
        checks.refuse()
    return dataclasses.replace(valid, image_format=kind, image_quality=quality, return_latents=request.return_latents)


def validate_extract(request: ExtractLike, info: EngineInfo, limits: RequestLimits) -> ValidRequest:
    """A request for features, ready to run.

    Raises:
        RpcError: INVALID_ARGUMENT with a violation for every field that is wrong.
    """
    checks = Checks(info, limits)
    check_bounds(checks, "run", request.run)
    _check_request_id(checks, request.request_id)
    valid = _run(checks, request.run, picture=False, previews=False)
    checks.refuse()
    if isinstance(request, feature_service_pb2.ExtractFeaturesRequest):
        check_answer(checks, valid.jobs, valid.selection, raw=False, latents=False)
        checks.refuse()
    return valid


def validate_attribute(
    request: feature_service_pb2.AttributeFeatureRequest, info: EngineInfo, limits: RequestLimits
) -> ValidRequest:
    """A request for what made a feature fire, ready to run.

    Raises:
        RpcError: INVALID_ARGUMENT with a violation for every field that is wrong.
    """
    checks = Checks(info, limits)
    check_bounds(checks, "run", request.run)
    _check_request_id(checks, request.request_id)
    if request.run.HasField("features"):
        checks.wrong("run.features", "is for runs that return features; leave it out")
    valid = _run(checks, request.run, picture=False, previews=False)
    if len(valid.jobs) > 1:
        field = "run.seeds" if len(request.run.seeds) > 1 else "run.source.prompt"
        checks.bad(field, f"{len(valid.jobs)} runs", "one run is attributed at a time")
    checks.refuse()
    (job,) = valid.jobs
    asked = check_attribute(checks, request, job)
    checks.refuse()
    saes = saes_edited(request.run.edits, info) | {asked.sae}
    return dataclasses.replace(
        valid, jobs=(dataclasses.replace(job, saes=(), attribute=asked),), selection=None, saes=frozenset(saes)
    )


def _check_request_id(checks: Checks, value: str) -> None:
    if len(value) > MAX_REQUEST_ID_CHARS or not (value.isascii() and value.isprintable()):
        checks.bad("request_id", value, f"must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters")


def _image(checks: Checks, image: run_pb2.ImageOptions) -> tuple[run_pb2.ImageFormat.ValueType, int]:
    checks.known("image.format", image.format, run_pb2.ImageFormat)
    kind = image.format or run_pb2.IMAGE_FORMAT_PNG
    if image.HasField("quality"):
        if kind not in (run_pb2.IMAGE_FORMAT_JPEG, run_pb2.IMAGE_FORMAT_WEBP):
            checks.bad("image.quality", image.quality, "only JPEG and WebP have a quality")
        elif not 1 <= image.quality <= 100:
            checks.bad("image.quality", image.quality, "must be 1 to 100")
    return kind, image.quality if image.HasField("quality") else 90


def _run(checks: Checks, run: run_pb2.Run, *, picture: bool, previews: bool) -> ValidRequest:
    source = check_source(checks, "run.source", run.source)
    sampled = check_sampling(checks, "run.sampling", run.sampling, run.source, source.size)
    steps, skipped, height, width, timesteps, guidance = sampled
    check_taken(checks, "run.source", run.source, steps + skipped)
    seeds = check_seeds(checks, "run.seeds", run.seeds)
    prompts = check_prompts(checks, run, source.prompt, len(seeds))
    read = {edit.reference for edit in run.edits}
    references = check_references(checks, "run.references", run.references, read, sampled)
    reads, edited = not picture or run.HasField("features"), saes_edited(run.edits, checks.info)
    named = set(run.features.saes or checks.info.saes) if reads else set()
    sae_options = check_sae_options(checks, "run.sae_options", run.sae_options, edited | named)
    masks = MaskChecks(checks)
    regions = check_regions(checks, masks, "run.regions", run.regions, (height, width))
    check_gate(checks, "run.gate", gate=run.gate)
    edits = EditChecks(
        checks, masks, steps=steps, size=(height, width), references=run.references, guided=guidance is not None
    ).edits("run.edits", run.edits)
    selection = check_selection(checks, "run.features", run.features, steps, skipped) if reads else None
    choosing = any(map(chooses, run.edits))

    def own(prompt: str) -> dict[str, Beside]:
        return {OWN: Beside(source._replace(prompt=prompt), None)} if choosing else {}

    lanes_field = "run.sampling.guidance_scale" if guidance else "run.references"
    check_lanes(checks, lanes_field, len(references) + choosing, guidance)
    used = edited | set(selection.saes if selection else ())
    check_steps_of(checks, "run.sampling.steps", used, steps, skipped)
    jobs = tuple(
        Job(
            prompt=prompt,
            start=source.start,
            seed=seed,
            steps=steps,
            skipped=skipped,
            height=height,
            width=width,
            timesteps=timesteps,
            edits=edits,
            references=tuple(
                Reference(name, beside.prompt, seed if other is None else other, beside.start)
                for name, (beside, other) in (references | own(prompt)).items()
            ),
            saes=selection.saes if selection else (),
            sae_options=sae_options,
            picture=picture,
            previews=previews,
            guidance=guidance,
            regions=regions,
            gate=run.gate,
        )
        for prompt in prompts
        for seed in seeds
    )
    filled = run_pb2.Run()
    filled.CopyFrom(run)
    filled.seeds[:] = seeds
    sampling = filled.sampling
    sampling.steps, sampling.height, sampling.width, sampling.timesteps[:] = steps + skipped, height, width, timesteps
    sampling.guidance_scale = guidance.scale if guidance else 0.0
    return ValidRequest(filled, jobs, selection, frozenset(used))
