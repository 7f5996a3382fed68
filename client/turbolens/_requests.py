"""Requests from arguments: pure functions, the same for both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from turbolens._edits import Edit, FeatureLike, to_refs
from turbolens._numbers import whole, whole_or_none
from turbolens._results import FORMATS
from turbolens_proto.v1 import feature_service_pb2, generation_service_pb2, run_pb2, steering_pb2

ImageFormat = Literal["png", "jpeg", "webp", "raw"]
Selection = bool | Sequence[str] | None
"""Features to return: None or False for none, True for all, or SAEs by name."""
Only = FeatureLike | Sequence[FeatureLike] | None
"""Of these, only the ones named; None for all."""
PerSae = Mapping[str, int] | None
"""A number for each SAE that is named; None for none."""


class ExtractOptions(TypedDict, total=False):
    """What `extract` takes beside the prompt and seeds; said once for its typed forms."""

    steps: int | None
    width: int | None
    height: int | None
    steer: Sequence[Edit]
    saes: Sequence[str] | None
    only: Only
    float32: bool
    k: PerSae
    prefix: PerSae
    timeout: float | None
    request_id: str


class GenerateOptions(TypedDict, total=False):
    """What `generate` takes beside the prompt and seeds; said once for its typed forms."""

    steps: int | None
    width: int | None
    height: int | None
    steer: Sequence[Edit]
    features: Selection
    only: Only
    float32: bool
    k: PerSae
    prefix: PerSae
    format: ImageFormat
    quality: int | None
    latents: bool
    timeout: float | None
    request_id: str


def one_or_many(seed: int | None, seeds: Sequence[int] | None) -> list[int]:
    """The seeds of a request; none where the server is to draw one.

    Raises:
        TypeError: one is no whole number.
        ValueError: both were given, or an empty list, or one that does not fit 63 bits.
    """
    if seed is not None and seeds is not None:
        raise ValueError("give seed for one picture or seeds for several, not both")
    if seeds is not None and not len(seeds):
        raise ValueError("seeds is empty; give at least one")
    several = [whole(one, "seed") for one in (([] if seed is None else [seed]) if seeds is None else seeds)]
    for one in several:
        if one >= 2**63:
            raise ValueError(f"seed {one} is too large; a seed is at least 0 and below 2**63")
    return several


def sampling(steps: int | None, width: int | None, height: int | None) -> run_pb2.Sampling:
    """Settings of a run; what is None is the server's default."""
    return run_pb2.Sampling(
        steps=whole_or_none(steps, "steps"),
        width=whole_or_none(width, "width"),
        height=whole_or_none(height, "height"),
    )


def selection(
    features: Selection, only: Only, float32: bool, *, argument: str = "features"
) -> run_pb2.FeatureSelection | None:
    """What to return of the features, and how.

    Raises:
        ValueError: `only` or `float32` says more of features that are not asked for, or a list is empty, which on the
            wire would mean all; `argument` is what the caller calls `features`.
    """
    refs = [] if only is None else to_refs(only)
    if only is not None and not refs:
        raise ValueError("only is empty and would select nothing; leave it out for every feature")
    if features is None and refs:
        features = list(dict.fromkeys(ref.sae for ref in refs))
    if features is None or features is False:
        if refs or float32:
            raise ValueError("only and float32 are about the features that come back; ask for features too")
        return None
    saes = [features] if isinstance(features, str) else [] if features is True else list(features)
    if features is not True and not saes:
        otherwise = "leave it out for none, or pass True for all" if argument == "features" else "leave it out for all"
        raise ValueError(f"{argument} is empty and would select nothing; {otherwise}")
    return run_pb2.FeatureSelection(
        saes=saes,
        only=[steering_pb2.FeatureRef(sae=ref.sae, index=ref.index) for ref in refs],
        value_type=run_pb2.VALUE_TYPE_FLOAT32 if float32 else run_pb2.VALUE_TYPE_UNSPECIFIED,
    )


def sae_options(k: PerSae, prefix: PerSae) -> list[run_pb2.SaeOptions]:
    """How SAEs are read, one entry for each that either names.

    Raises:
        TypeError: one is not a mapping, or not of whole numbers.
    """
    for name, given in (("k", k), ("prefix", prefix)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f'{name} is {given!r}; say of which SAE: {name}={{"up.0.1": {given!r}}}')
    k, prefix = k or {}, prefix or {}
    return [
        run_pb2.SaeOptions(
            sae=sae,
            k=whole_or_none(k.get(sae), f"k of {sae}"),
            prefix=whole_or_none(prefix.get(sae), f"prefix of {sae}"),
        )
        for sae in dict.fromkeys((*k, *prefix))
    ]


def generate_request(
    prompt: str,
    *,
    seeds: Sequence[int],
    steps: int | None,
    width: int | None,
    height: int | None,
    steer: Sequence[Edit],
    features: Selection,
    only: Only,
    float32: bool,
    k: PerSae,
    prefix: PerSae,
    format: ImageFormat,
    quality: int | None,
    latents: bool,
    request_id: str,
) -> generation_service_pb2.GenerateRequest:
    """A request for pictures."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r}; use one of {', '.join(FORMATS)}")
    return generation_service_pb2.GenerateRequest(
        request_id=request_id,
        prompt=run_pb2.PromptSource(text=prompt),
        sampling=sampling(steps, width, height),
        seeds=seeds,
        edits=[edit.to_proto() for edit in steer],
        features=selection(features, only, float32),
        sae_options=sae_options(k, prefix),
        image=run_pb2.ImageOptions(format=FORMATS[format], quality=whole_or_none(quality, "quality")),
        return_latents=latents,
    )


def extract_request(
    prompt: str,
    *,
    seeds: Sequence[int],
    steps: int | None,
    width: int | None,
    height: int | None,
    steer: Sequence[Edit],
    saes: Sequence[str] | None,
    only: Only,
    float32: bool,
    k: PerSae,
    prefix: PerSae,
    request_id: str,
) -> feature_service_pb2.ExtractFeaturesRequest:
    """A request for features; unless some are named, all of them."""
    wanted = True if saes is None and only is None and float32 else saes
    return feature_service_pb2.ExtractFeaturesRequest(
        request_id=request_id,
        prompt=run_pb2.PromptSource(text=prompt),
        sampling=sampling(steps, width, height),
        seeds=seeds,
        edits=[edit.to_proto() for edit in steer],
        features=selection(wanted, only, float32, argument="saes"),
        sae_options=sae_options(k, prefix),
    )
