"""Engines of the same model with other SAEs: loaded, unloaded, read again.

Nothing is changed in place. Each function gives another engine beside the one that serves, so that what began with one
ends with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.info import MemoryNeed, SaeInfo
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.memory import available_bytes, encoding_bytes, size_of, slack
from turbolens_server.loading.saes import fitting, load_saes
from turbolens_server.unet.points import list_points


def with_loaded(engine: Engine, source: str, max_batch: int, *, force: bool = False) -> Engine:
    """An engine that serves what `--sae SOURCE` names, too.

    Raises:
        LoadError: it cannot be served, or something of that name is.
    """
    return _with(engine, [*engine.info.saes.values(), *_read(engine, source, force=force)], max_batch)


def without(engine: Engine, name: str, max_batch: int) -> Engine:
    """An engine without one of its SAEs.

    Raises:
        KeyError: there is none of that name.
    """
    gone = engine.info.saes[name]
    return _with(engine, [sae for sae in engine.info.saes.values() if sae is not gone], max_batch)


def reloaded(engine: Engine, name: str, max_batch: int) -> Engine:
    """An engine with one of its SAEs read again.

    Raises:
        KeyError: there is none of that name.
        LoadError: it cannot be served as it is now, or was never read.
    """
    old = engine.info.saes[name]
    if not old.source:
        raise LoadError(f"SAE {name}: it came with the model, from no folder")
    new = [sae for sae in _read(engine, old.source, force=old.forced) if sae.name == name]
    if not new:
        raise LoadError(f"SAE {name}: --sae {old.source} holds it no more")
    return _with(engine, [new[0] if sae is old else sae for sae in engine.info.saes.values()], max_batch)


def _read(engine: Engine, source: str, *, force: bool) -> list[SaeInfo]:
    info = engine.info
    found = load_saes(source, engine.components.points.keys(), info.model_hash, force, fused=bool(info.loras))
    tapped = [point.name for point in info.hook_points]
    for sae in found:
        if sae.hook_point not in tapped:
            raise LoadError(
                f"SAE {sae.name}: this server reads {list_points(tapped)}, and not {sae.hook_point}; start one with an "
                "SAE there"
            )
    return found


def _with(engine: Engine, saes: Sequence[SaeInfo], max_batch: int) -> Engine:
    points = {point.name: point for point in engine.info.hook_points}
    served = fitting(saes, points, engine.info.max_steps)
    new = sum(_weights(sae) for sae in served if engine.info.saes.get(sae.name) is not sae)
    free = available_bytes(engine.device)
    if free is not None and new > free:
        raise LoadError(f"SAEs of {new / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free; unload others first")
    need = _memory(engine, served, max_batch)
    if refusal := need.refusal(engine.info.device, f"a batch of {max_batch}"):
        raise LoadError(refusal)
    return engine.serving(served, need)


def _memory(engine: Engine, saes: Sequence[SaeInfo], max_batch: int) -> MemoryNeed:
    """What serving takes with these SAEs, by what it takes with the engine's own."""
    points, size = {point.name: point for point in engine.info.hook_points}, engine.info.default_size

    def encoding(saes: Sequence[SaeInfo]) -> int:
        positions = {sae.name: math.prod(points[sae.hook_point].grid(*size)) for sae in saes}
        return encoding_bytes(
            [(positions[sae.name], sae.bundle.d_sae) for sae in saes],
            [positions[sae.name] * sae.bundle.d_in for sae in saes if sae.bundle.steps],
            max_batch,
        )

    old = engine.info.memory
    more = max(0, encoding(saes) - encoding(tuple(engine.info.saes.values())))
    return dataclasses.replace(old, saes=sum(map(_weights, saes)), activations=old.activations + slack(more))


def _weights(sae: SaeInfo) -> int:
    return sum(size_of(tensor) for tensor in sae.bundle.weights.tensors().values())
