"""Requests from arguments: pure functions, the same for both clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from turbolens_proto.v1 import feature_service_pb2, generation_service_pb2, run_pb2

from turbolens._edits import Edit
from turbolens._results import FORMATS

ImageFormat = Literal["png", "jpeg", "webp", "raw"]
Selection = bool | Sequence[str] | None
"""Features to return: None or False for none, True for all, or SAEs by name."""


def one_or_many(seed: int | None, seeds: Sequence[int] | None) -> list[int]:
    """The seeds of a request; none where the server is to draw one.

    Raises:
        ValueError: both were given, or an empty list.
    """
    if seeds is None:
        return [] if seed is None else [seed]
    if seed is not None:
        raise ValueError("give seed for one picture or seeds for several, not both")
    if not len(seeds):
        raise ValueError("seeds is empty; give at least one")
    return list(seeds)


def sampling(steps: int | None, width: int | None, height: int | None) -> run_pb2.Sampling:
    """Settings of a run; what is None is the server's default."""
    return run_pb2.Sampling(steps=steps, width=width, height=height)


def selection(features: Selection) -> run_pb2.FeatureSelection | None:
    """What to return of the features."""
    if features is None or features is False:
        return None
    if isinstance(features, str):
        return run_pb2.FeatureSelection(saes=[features])
    return run_pb2.FeatureSelection(saes=[] if features is True else list(features))


def generate_request(
    prompt: str,
    *,
    seeds: Sequence[int],
    steps: int | None,
    width: int | None,
    height: int | None,
    steer: Sequence[Edit],
    features: Selection,
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
        features=selection(features),
        image=run_pb2.ImageOptions(format=FORMATS[format], quality=quality),
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
    features: Selection,
    request_id: str,
) -> feature_service_pb2.ExtractFeaturesRequest:
    """A request for features."""
    return feature_service_pb2.ExtractFeaturesRequest(
        request_id=request_id,
        prompt=run_pb2.PromptSource(text=prompt),
        sampling=sampling(steps, width, height),
        seeds=seeds,
        edits=[edit.to_proto() for edit in steer],
        features=selection(features),
    )
