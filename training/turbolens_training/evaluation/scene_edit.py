"""The grid of SceneEdit: every steering method on the same pairs, from doing nothing to changing the prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_server.sae.sae import Sae
from turbolens_training.activations.taps import Intervention
from turbolens_training.evaluation.config import EvalConfig
from turbolens_training.evaluation.dose import read_labelled
from turbolens_training.evaluation.edits import (
    NOTHING,
    PROMPT,
    CaptionPairs,
    Material,
    Method,
    edit_pictures,
    patch,
    transfer,
    transfer_dense,
    transfer_random,
)
from turbolens_training.evaluation.interventions import shift
from turbolens_training.evaluation.kept import KeptBatches
from turbolens_training.evaluation.named import named_methods
from turbolens_training.evaluation.pairs import EditScore, Group, caption_pairs, draw_pairs, score_edits
from turbolens_training.evaluation.sampling import decode, device_of, saes_by_block, sample, thumbnails
from turbolens_training.measures.concepts import Concept, pick_concepts
from turbolens_training.measures.counterfactual import Sheet


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting of one method."""

    method: str
    features: int | None = None
    """Features given, and as many taken; None where a method counts none."""
    multiplier: float | None = None

    def __str__(self) -> str:
        features = "" if self.features is None else f" {self.features}"
        return f"{self.method}{features}" + ("" if self.multiplier is None else f" x{self.multiplier:g}")


def best_labelled(labels: Mapping[str, Sequence[Mapping[str, Any]]], concept: Concept) -> tuple[str, int] | None:
    """The block and index of the feature labelled with a concept whose score times sureness is largest."""
    found = [
        (label["score"] * row["sureness"], block, int(row["index"]))
        for block, rows in labels.items()
        for row in rows
        for label in row["labels"]
        if (label["attribute"], label["value"]) == (concept.attribute, concept.value)
    ]
    return max(found)[1:] if found else None


def labelled_directions(
    saes: Mapping[str, Sae], groups: Sequence[Group], labels: Mapping[str, Any]
) -> dict[str, Tensor]:
    """For every pair its concept's best-labelled feature, times its mean activation: by hook point [N, d_model].

    Zero in the other blocks, and for a concept that no feature is labelled with.
    """
    sizes = [len(group.scenes.seeds) for group in groups]
    directions = {block: sae.W_dec.new_zeros(sum(sizes), sae.W_dec.shape[1]) for block, sae in saes.items()}
    for index, group in enumerate(groups):
        if (best := best_labelled(labels, group.concept)) is None:
            continue
        block, feature = best
        stats = saes[block].bundle.stats
        if stats is None:
            raise ValueError(f"{block} has no statistics")
        start = sum(sizes[:index])
        directions[block][start : start + sizes[index]] = float(stats.mean[feature]) * saes[block].W_dec[feature]
    return directions


def mean_directions(
    engine: Engine, saes: Mapping[str, Sae], groups: Sequence[Group], choice: Sequence[Group], config: EvalConfig
) -> dict[str, Tensor]:
    """For every pair of `groups`, how the edited caption changes the update: by hook point [T, N, d_model].

    It is the mean over all positions and over the pairs of `choice` of the same concept.
    """
    pairs = caption_pairs(choice)
    changes: dict[str, list[Tensor]] = {block: [] for block in saes}
    for start in range(0, len(pairs), config.batch):
        some = pairs[start : start + config.batch]
        runs = [
            sample(engine, captions, some.seeds, config.steps, keep=True) for captions in (some.captions, some.edited)
        ]
        for block in saes:
            changes[block].append((runs[1].updates[block] - runs[0].updates[block]).mean(2))  # [T, N, d_model]
    directions = {}
    for block, parts in changes.items():
        by_group = torch.cat(parts, 1).split([len(group.scenes.seeds) for group in choice], 1)
        means = [change.mean(1, keepdim=True) for change in by_group]
        repeated = [m.expand(-1, len(g.scenes.seeds), -1) for m, g in zip(means, groups, strict=True)]
        directions[block] = torch.cat(repeated, 1)
    return directions


def push(directions: Mapping[str, Tensor], strength: float) -> Method:
    """Add directions at every position: by hook point [T or 1, all pairs, d_model], times the strength."""

    def method(m: Material) -> Intervention:
        deltas = {}
        for block, direction in directions.items():
            steps = len(m.base.updates[block])
            deltas[block] = strength * direction[:, m.rows, None].expand(steps, -1, -1, -1)
        return shift(deltas)

    return method


def grid(engine: Engine, saes: Mapping[str, Sae], groups: Sequence[Group], config: EvalConfig) -> dict[Cell, Method]:
    """Every setting of every method."""
    cells: dict[Cell, Method] = {}
    for n in config.features:
        for multiplier in config.multipliers:
            cells[Cell("transfer", n, multiplier)] = transfer(n, multiplier)
        cells[Cell("random features", n, 1.0)] = transfer_random(n, 1.0, config.seed)
    labels = {
        info.hook_point: read_labelled(info, info.bundle.folder)
        for info in engine.info.saes.values()
        if info.bundle.folder is not None and (info.bundle.folder / "features.parquet").exists()
    }
    if labels:
        for (name, strength), method in named_methods(
            saes, labels, groups, config.known_features, config.strengths, config.seed
        ).items():
            cells[Cell(name, None, strength)] = method
        directions = {b: d[None] for b, d in labelled_directions(saes, groups, labels).items()}
        for strength in config.strengths:
            cells[Cell("add one labelled", None, strength)] = push(directions, strength)
    choice = draw_pairs(
        engine, [group.concept for group in groups], config.choice_pairs, f"{config.seed}/scene edit/choice"
    )
    means = mean_directions(engine, saes, groups, choice, config)
    for multiplier in config.mean_multipliers:
        cells[Cell("mean difference", None, multiplier)] = push(means, multiplier)
    for multiplier in config.multipliers:
        cells[Cell("dense transfer", None, multiplier)] = transfer_dense(multiplier)
    cells[Cell("patch")] = patch([point.name for point in engine.info.hook_points])
    return cells


@dataclasses.dataclass(frozen=True)
class SceneEdit:
    """What every cell did to every attribute."""

    scores: dict[Cell, dict[str, EditScore]]
    pairs: CaptionPairs
    groups: list[Group]
    latents: dict[Cell, Tensor]  # [N, C, h, w]

    def best(self) -> dict[str, Cell]:
        """The setting of each method that brings most pictures nearer without breaking others, over all attributes."""
        found: dict[str, Cell] = {}
        for cell, scores in self.scores.items():
            kept = found.get(cell.method)
            if kept is None or _worth(scores["all"]) > _worth(self.scores[kept]["all"]):
                found[cell.method] = cell
        return found

    def rows(self) -> list[dict[str, object]]:
        """The table: a row for each cell and attribute."""
        return [
            {
                "method": cell.method,
                "features": "" if cell.features is None else cell.features,
                "multiplier": "" if cell.multiplier is None else cell.multiplier,
                "attribute": attribute,
                "pairs": score.pairs,
                "progress": round(score.progress, 3),
                "nearer": round(score.nearer, 3),
                "nearer_low": round(score.interval(score.nearer)[0], 3),
                "nearer_high": round(score.interval(score.nearer)[1], 3),
                "psnr": round(score.psnr, 2),
                "others_right": round(score.others, 3),
                "others_low": round(score.interval(score.others)[0], 3),
                "others_high": round(score.interval(score.others)[1], 3),
            }
            for cell, scores in self.scores.items()
            for attribute, score in scores.items()
        ]


def with_series(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table of cells, each with its curve: numbers of features at one multiplier, or multipliers."""
    return [
        {**row, "series": row["method"] if row["features"] == "" else f"{row['method']} x{row['multiplier']:g}"}
        for row in rows
    ]


def _worth(score: EditScore) -> float:
    return score.nearer * score.others


def _what(engine: Engine, config: EvalConfig, methods: Mapping[str, Method]) -> str:
    """All that the pictures of a run depend on."""
    settings = {name: str(value) for name, value in dataclasses.asdict(config).items() if name not in ("out", "parts")}
    hashes = [engine.info.model_hash, *(sae.bundle.hash for sae in engine.info.saes.values())]
    return json.dumps([settings, hashes, list(methods)])


def measure_scene_edit(engine: Engine, config: EvalConfig) -> SceneEdit:
    """Run the whole grid."""
    saes = saes_by_block(engine)
    groups = draw_pairs(engine, pick_concepts(config.concepts), config.pairs, f"{config.seed}/scene edit")
    pairs = caption_pairs(groups)
    cells = grid(engine, saes, groups, config)
    methods = {str(cell): method for cell, method in cells.items()}
    kept = KeptBatches(config.out / "edits.parts", _what(engine, config, methods))
    found = edit_pictures(
        engine, saes, pairs, methods, steps=config.steps, batch=config.batch, title="edits", kept=kept
    )
    everything = [Cell(NOTHING), *cells, Cell(PROMPT)]
    latents = {cell: found[str(cell)] for cell in everything}
    sheets = [Sheet(group.scenes, latents[everything[0]].shape[-1]) for group in groups]
    scores = {cell: score_edits(groups, thumbnails(x), sheets) for cell, x in latents.items()}
    kept.drop()
    return SceneEdit(scores, pairs, groups, latents)


def example_pictures(engine: Engine, result: SceneEdit) -> tuple[list[str], list[str], Tensor]:
    """One pair of each attribute under the best setting of each method.

    Returns:
        Names of the rows, names of the columns, pictures [rows, columns, 3, H, W]; the last column is the exact one.
    """
    firsts: dict[str, tuple[int, int]] = {}
    start = 0
    for index, group in enumerate(result.groups):
        firsts.setdefault(group.concept.attribute, (index, start))
        start += len(group.scenes.seeds)
    best = result.best()
    shown = [row for _, row in firsts.values()]
    columns = torch.stack(
        [decode(engine, result.latents[cell][shown].to(device_of(engine))) for cell in best.values()], 1
    )
    size = columns.shape[-1]
    exact = torch.stack([result.groups[index].exact(size)[1][0] for index, _ in firsts.values()])
    names = [f"{result.pairs.captions[row]} → {result.groups[index].concept}" for index, row in firsts.values()]
    return names, [*map(str, best.values()), "exact"], torch.cat([columns, exact[:, None]], 1)
