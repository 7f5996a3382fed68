"""`turbolens train sweep`: collect once, train every point, measure each as it is served, write one table."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from turbolens_server.engine.engine import Engine
from turbolens_server.files import first_line, write_file
from turbolens_server.loading.load import load_engine
from turbolens_training.activations.cached import CachedStream
from turbolens_training.activations.prompt_specs import open_prompts
from turbolens_training.activations.prompts import PromptSource
from turbolens_training.activations.sources import open_model, open_streams
from turbolens_training.activations.stream import PromptStream
from turbolens_training.evaluation.config import EvalConfig
from turbolens_training.evaluation.probes import measure_probes
from turbolens_training.evaluation.splice import measure_splice
from turbolens_training.measures.concepts import reads_scenes
from turbolens_training.sae.config import OF_EXPORT, OF_THE_MACHINE, SaeConfig
from turbolens_training.sae.sweep.config import Point, SweepConfig
from turbolens_training.sae.sweep.report import write_sweep
from turbolens_training.sae.sweep.served import compare_served
from turbolens_training.sae.train import train_saes

RESULT: Final = "result.json"
"""In a point's folder: its recipe, and its quality."""
EVALUATED: Final = "evaluated.json"
"""Beside it, of one point for each architecture."""


def sweep(config: SweepConfig) -> None:
    """Do what is not done yet; the report is written after every point, so that a sweep cut short leaves one.

    Raises:
        ValueError: `work` holds a point of other settings.
    """
    prompts = open_prompts(config.prompts, seed=config.seed)
    engine = open_model(config)
    grid = config.grid()
    runs = {point: config.training(point) for point in grid}
    recipes = {point: recipe_of(engine, prompts.identity, settings) for point, settings in runs.items()}
    missing = [point for point in grid if read_result(runs[point].work / RESULT, recipes[point]) is None]
    collect(engine, config.cache, [runs[point] for point in missing], prompts)
    elected, results = elect(grid), []
    for number, point in enumerate(grid, 1):
        print(f"{number} of {len(grid)}: {point.name}", file=sys.stderr)
        settings, recipe = runs[point], recipes[point]
        result = once(settings.work / RESULT, recipe, functools.partial(train_point, settings))
        if point in elected:
            extent = {name: getattr(config, name) for name in ("served_pictures", "splice_scenes", "probe_pictures")}
            evaluated = functools.partial(evaluate_point, settings, prompts, **extent)
            result |= once(settings.work / EVALUATED, {**recipe, **extent}, evaluated)
        results.append({"architecture": point.architecture, "k": point.k, "d_sae": point.d_sae, **result})
        write_sweep(config.out, results)
    config.tell(config.out / "sweep.md", table=config.out / "sweep.md", results=results)


def elect(grid: Sequence[Point]) -> set[Point]:
    """One point of each architecture, the middle one by k and then size."""
    points = sorted(grid, key=lambda point: (point.k, point.d_sae))
    alike = [[point for point in points if point.architecture == name] for name in {p.architecture for p in grid}]
    return {some[len(some) // 2] for some in alike}


def recipe_of(engine: Engine, prompts: str, settings: SaeConfig) -> dict[str, Any]:
    """What decides a point's result, as JSON has it; `prompts` is their identity, not the place that they are in."""
    info = engine.info
    recipe = {"model_hash": info.model_hash, "components_hash": info.components_hash, **dataclasses.asdict(settings)}
    for name in (*OF_THE_MACHINE, *OF_EXPORT):
        del recipe[name]
    recipe["prompts"] = prompts
    plain: dict[str, Any] = json.loads(json.dumps(recipe))
    return plain


def read_result(path: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """What :func:`once` kept at `path`; None where there is nothing yet.

    Raises:
        ValueError: it was made by another recipe.
    """
    if not path.exists():
        return None
    try:
        kept: dict[str, Any] = json.loads(path.read_text())
        of = dict(kept["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: unreadable ({first_line(error)}); delete it, and the point is made again") from error
    if of != recipe:
        changed = [name for name, value in recipe.items() if of.get(name) != value]
        raise ValueError(f"{path}: of a sweep with another {', '.join(changed)}; choose another --work")
    return kept


def once(path: Path, recipe: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, with its recipe, kept at `path` for the next time."""
    if (kept := read_result(path, recipe)) is not None:
        return kept
    made = {"recipe": dict(recipe), **make()}
    write_file(path, json.dumps(made, indent=1) + "\n")
    return made


def collect(engine: Engine, cache: Path, points: Sequence[SaeConfig], prompts: PromptSource) -> None:
    """Make the pictures that all points train on and are measured on; those of the same mix of steps share them."""
    for settings in {point.step_mix: point for point in points}.values():
        training, held_out = open_streams(engine, settings, prompts)
        for stream, chunks in (
            (training, chunks_of_run(engine, training, settings)),
            (held_out, settings.held_out_chunks),
        ):
            cached = CachedStream(stream, cache)
            for index in tqdm(range(chunks), desc=f"pictures, {stream.split}", unit="chunk"):
                cached.fill(index)


def chunks_of_run(engine: Engine, stream: PromptStream, settings: SaeConfig) -> int:
    """Chunks that a run takes: those that fill its reservoirs, then one each `steps_per_chunk`."""
    positions = min(math.prod(point.grid(*engine.info.default_size)) for point in engine.info.hook_points)
    tokens, chunks = 0, 0
    while tokens < settings.reservoir:
        steps = 1 if settings.architecture == "temporal" else stream.steps_of(chunks)
        tokens += settings.images * min(settings.tokens_per_image, positions) * steps
        chunks += 1
    return chunks + settings.steps // settings.steps_per_chunk


def train_point(settings: SaeConfig) -> dict[str, Any]:
    """Train, export and measure one point; all that is not in its bundles."""
    began = time.perf_counter()
    train_saes(settings)
    seconds = time.perf_counter() - began
    rows = [row for row in json.loads((settings.work / "quality.json").read_text()) if row["timestep"] == "all"]
    gates = {
        row["block"]: json.loads((settings.out / row["block"] / "provenance.json").read_text())["gates"]["below"]
        for row in rows
    }
    return {"seconds_per_sae": round(seconds / len(gates), 1), "below_gates": gates, "quality": rows}


def evaluate_point(
    settings: SaeConfig, prompts: PromptSource, *, served_pictures: int, splice_scenes: int, probe_pictures: int
) -> dict[str, Any]:
    """Serve one point's bundles over a socket, and evaluate those that read a step at a time."""
    engine = load_engine(
        model=settings.model, device=settings.device, variant=settings.variant, saes=[str(settings.out)]
    )
    _, held_out = open_streams(engine, settings, prompts)
    (architecture,) = {sae.bundle.architecture for sae in engine.saes.values()}
    served = {"architecture": architecture, **compare_served(engine, settings, held_out, served_pictures)}
    if settings.architecture == "temporal" or not reads_scenes(engine):
        return {"served": served}
    extent = EvalConfig(
        model=settings.model,
        device=settings.device,
        seed=settings.seed,
        splice_scenes=splice_scenes,
        probe_pictures=probe_pictures,
    )
    probes, _ = measure_probes(engine, extent)
    return {"served": served, "splice": measure_splice(engine, extent), "probes": probes}
