"""Bounds that cost nothing to look at, before any part of a request is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from turbolens_proto.v1 import run_pb2
from turbolens_server.rpc.validation.checks import Checks
from turbolens_server.steering.masks import png_size


def check_bounds(checks: Checks, field: str, run: run_pb2.Run) -> None:
    """Refuse what is too much: lists by their length, masks by what their headers say.

    Raises:
        RpcError: INVALID_ARGUMENT.
    """
    limits = checks.limits
    lists: tuple[tuple[str, Sequence[Any], int], ...] = (
        ("seeds", run.seeds, limits.max_seeds),
        ("more_prompts", run.more_prompts, limits.max_seeds - 1),
        ("edits", run.edits, limits.max_edits),
        ("regions", run.regions, limits.max_regions),
        ("sampling.timesteps", run.sampling.timesteps, checks.info.max_steps),
        ("sae_options", run.sae_options, limits.max_saes),
        ("features.saes", run.features.saes, limits.max_saes),
        ("features.only", run.features.only, limits.max_selected),
    )
    for name, items, most in lists:
        if len(items) > most:
            checks.bad(f"{field}.{name}", f"{len(items)} {name.rpartition('.')[2]}", f"at most {most} are allowed")
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
