"""Bounds that cost nothing to look at, before any part of a request is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized

from turbolens_proto.v1 import run_pb2
from turbolens_server.rpc.validation.checks import Checks, RequestLimits
from turbolens_server.steering.masks import png_size


def check_bounds(checks: Checks, field: str, run: run_pb2.Run) -> None:
    """Refuse what is too much: lists by their length, masks by what their headers say.

    Raises:
        RpcError: INVALID_ARGUMENT.
    """
    limits = checks.limits
    for name, items, most in _lists(run, limits, checks.info.max_steps):
        if len(items) > most:
            checks.bad(f"{field}.{name}", f"{len(items)} {name.rpartition('.')[2]}", f"at most {most} are allowed")
    checks.refuse()
    count = sum(
        len(edit.features) + len(edit.transfer.remove) + 2 * max(edit.transfer.choice.features, 0) for edit in run.edits
    )
    if count > limits.max_request_features:
        allowed = f"the edits of a request may name {limits.max_request_features} in all"
        checks.bad(f"{field}.edits", f"{count} features", allowed)
    checks.refuse()
    pixels = 0
    masks = {f"edits[{i}].mask": edit.mask for i, edit in enumerate(run.edits)}
    masks |= {f"edits[{i}].transfer.choice.own_mask": e.transfer.choice.own_mask for i, e in enumerate(run.edits)}
    masks |= {f"regions[{i}].mask": region.mask for i, region in enumerate(run.regions)}
    for name, mask in masks.items():
        pixels += math.prod(png_size(mask.png) or (0, 0))
        if pixels > limits.max_mask_pixels:
            allowed = f"the PNG masks of a request may hold {limits.max_mask_pixels} pixels in all"
            checks.bad(f"{field}.{name}.png", f"{pixels} pixels up to here", allowed)
            break
    checks.refuse()


def _lists(run: run_pb2.Run, limits: RequestLimits, max_steps: int) -> Iterator[tuple[str, Sized, int]]:
    """Each list of a run by its path, and how long it may be. Those of single edits come last: how many there are is
    known by then to be few."""
    yield "seeds", run.seeds, limits.max_seeds
    yield "more_prompts", run.more_prompts, limits.max_seeds - 1
    yield "regions", run.regions, limits.max_regions
    yield "references", run.references, limits.max_references
    yield "sampling.timesteps", run.sampling.timesteps, max_steps
    yield "sae_options", run.sae_options, limits.max_saes
    yield "features.saes", run.features.saes, limits.max_saes
    yield "features.only", run.features.only, limits.max_selected
    yield "edits", run.edits, limits.max_edits
    for i, edit in enumerate(run.edits[: limits.max_edits]):
        yield f"edits[{i}].transfer.choice.saes", edit.transfer.choice.saes, limits.max_saes
        yield f"edits[{i}].patch.hook_points", edit.patch.hook_points, limits.max_saes
