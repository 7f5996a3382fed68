"""Trained SAEs to bundles that the server loads, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from turbolens_server.engine.info import EngineInfo
from turbolens_server.loading.device import versions
from turbolens_server.sae.bundle import FeatureStats, load_bundle, save_bundle
from turbolens_server.sae.sae import Sae
from turbolens_training.mini.captions import SYNONYMS
from turbolens_training.sae.config import OF_EXPORT, OF_THE_MACHINE, SaeConfig
from turbolens_training.sae.trainer import SaeTraining


def synonyms() -> dict[str, list[str]]:
    """The other words for each value of a scene, for search."""
    return {value: sorted({*words} - {value, ""}) for value, words in SYNONYMS.items()}


def recipe_of(config: SaeConfig) -> dict[str, Any]:
    """What decides what a run comes to; the gates have an entry of their own."""
    settings = dataclasses.asdict(config)
    return {name: value for name, value in settings.items() if name not in (*OF_THE_MACHINE, *OF_EXPORT)}


def write_bundles(
    folder: Path,
    info: EngineInfo,
    run: SaeTraining,
    *,
    stats: Mapping[str, FeatureStats] | None = None,
    quality: Sequence[Mapping[str, object]] = (),
    gates: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Write one bundle for each SAE of a run into `folder`, by the hook point's name."""
    recipe = recipe_of(run.config)
    for point in info.hook_points:
        if point.name not in run.trainers:  # of another rank
            continue
        export = run.trainers[point.name].export()
        provenance: dict[str, Any] = {
            "recipe": recipe,
            "data": {
                "kind": run.source.kind,
                "identity": run.source.identity,
                "seed": run.config.seed,
                "steps": run.step,
            },
            "metrics": [row for row in quality if row["block"] == point.name],
            "versions": versions(),
            "synonyms": synonyms(),
            **({"gates": gates[point.name]} if gates else {}),
        }
        save_bundle(
            folder / point.name,
            hook_point=point.name,
            hook_module=point.module,
            model_name=Path(info.model).name,
            model_hash=info.model_hash,
            architecture=export.architecture,
            k=export.k,
            weights=export.weights,
            nesting=export.nesting,
            stats=None if stats is None else stats[point.name],
            provenance=provenance,
            half=run.config.half,
        )


def read_saes(folder: Path, points: Iterable[str], device: torch.device) -> dict[str, Sae]:
    """The bundles in `folder` of these hook points, ready to run, by hook point."""
    return {point: Sae(load_bundle(folder / point), device) for point in points}
