"""The SAEs that `--sae` names, and the grammar of what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbolens_server.engine.info import SaeInfo
from turbolens_server.loading.checks import is_foreign
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hub import SAE_PATTERNS, resolve, snapshot
from turbolens_server.sae.formats.names import check_name
from turbolens_server.sae.formats.read import at_block, find_saes, is_bundle, read_sae
from turbolens_server.unet.points import HookPoint, find_point, list_points


def _parts_of(source: str, points: Any) -> tuple[str | None, str | None, str]:
    """What one `--sae` says: (name, hook point, folder or hub id), of `[NAME][@][BLOCK]=PATH` or a path alone."""
    front, _, path = source.partition("=")
    if not front or not path or "/" in front or Path(source).expanduser().exists():
        return None, None, source
    name, at, block = front.rpartition("@")
    if not at and front not in points and find_point(front) != front:
        return front, None, path
    if block not in points:
        raise LoadError(f"--sae {source}: the model has no block {block}; it has {list_points(points)}")
    return name or None, block, path


def load_saes(source: str, points: Any, model_hash: str, force: bool, fused: bool = False) -> list[SaeInfo]:
    """Every SAE that one `--sae` names; `fused` says that the model is not the one of its folder."""
    name, hook_point, path = _parts_of(source, points)
    if not path.strip():
        raise LoadError(f"--sae {source!r}: names no folder and no hub id")
    folder = resolve(path, "--sae", snapshot(SAE_PATTERNS))
    try:
        found = find_saes(folder)
    except ValueError as error:
        raise LoadError(f"--sae {source}: {error}") from error
    if not found:
        raise LoadError(f"--sae {source}: no SAE in {folder} (no cfg.json, and the weights of no known format)")
    if (name or hook_point) and len(found) > 1:
        raise LoadError(f"--sae {source}: {folder} holds {len(found)} SAEs; name one of them")
    try:
        bundles = [read_sae(path, None if is_bundle(path) else hook_point) for path in found]
        moved = [bundle.hook_point for bundle in bundles if hook_point not in (None, bundle.hook_point)]
        if moved and not force:
            raise LoadError(
                f"--sae {source}: trained on {moved[0]}; leave out the block, or pass --force-sae to serve it at "
                f"{hook_point} all the same (every result will say so)"
            )
        if hook_point is not None:
            bundles = [at_block(bundle, hook_point) for bundle in bundles]
        if name is not None:
            bundles = [dataclasses.replace(b, name=check_name(name, b.hook_point)) for b in bundles]
    except ValueError as error:
        raise LoadError(f"--sae {error}") from error
    infos = []
    for bundle in bundles:
        if bundle.hook_point not in points:
            raise LoadError(
                f"SAE {bundle.name}: the model has no block {bundle.hook_point}; it has {list_points(points)}"
            )
        what, flag = f"SAE {bundle.name}", None if force else "--force-sae"
        foreign = is_foreign(what, "it", bundle.model_hash, model_hash, fused=fused, force=flag)
        infos.append(SaeInfo(bundle.name, bundle.hook_point, bundle, foreign or bool(moved), source))
    return infos


def fitting(saes: Sequence[SaeInfo], points: Mapping[str, HookPoint], max_steps: int) -> list[SaeInfo]:
    """SAEs that can be served together, in order of their blocks in the U-Net.

    Raises:
        LoadError: one of them does not fit the model, or two have one name.
    """
    for sae in saes:
        d_model = points[sae.hook_point].d_model
        if sae.bundle.d_model != d_model:
            raise LoadError(f"SAE {sae.name}: reads {sae.bundle.d_model} dimensions, {sae.hook_point} has {d_model}")
        if (sae.bundle.steps or 1) > max_steps:
            raise LoadError(
                f"SAE {sae.name}: serves runs of {sae.bundle.steps} steps alone, and requests may have {max_steps}; "
                "raise --max-steps"
            )
    names = [sae.name for sae in saes]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise LoadError(f"two SAEs are called {', '.join(sorted(doubled))}; name one by --sae NAME=PATH")
    order = list(points)
    return sorted(saes, key=lambda sae: order.index(sae.hook_point))
