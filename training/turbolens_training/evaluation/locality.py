"""How adding a feature to half of the picture changes it: what stays in that half, and whether colour or texture moves.

A change of a picture is split by frequency: its mean over a neighbourhood is a change of colour and light, the rest
one of texture and edges.
"""

from __future__ import annotations

import random
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.info import SaeInfo
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import Box, BoxMask
from turbolens_training.evaluation.config import EvalConfig
from turbolens_training.measures.concepts import Scenes, generate
from turbolens_training.mini.report import held_out

_HALF: Final = BoxMask((Box(0, 0, 0.5, 1),))
_NEIGHBOURHOOD: Final = 5
"""Pixels of a thumbnail, each way, over which a change counts as one of colour."""


def share_inside(change: Tensor, inside: Tensor) -> float | None:
    """Share of the squared change [N, 3, h, w] that falls where `inside` [h, w] bool; None where nothing changed."""
    squares = change.double().square().sum((0, 1))  # [h, w]
    total = squares.sum().item()
    return squares[inside].sum().item() / total if total > 0 else None


def split_by_frequency(change: Tensor) -> tuple[Tensor, Tensor]:
    """A change [N, 3, h, w] as its local mean and the rest, which add up to it."""
    low = functional.avg_pool2d(change, _NEIGHBOURHOOD, 1, _NEIGHBOURHOOD // 2, count_include_pad=False)
    return low, change - low


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _active_features(info: SaeInfo, n: int, rng: random.Random) -> list[int]:
    if info.bundle.measured is None:
        raise ValueError(f"{info.name} has no measured statistics; turbolens catalog build makes them")
    active = np.flatnonzero(info.bundle.measured.frequency > 0).tolist()
    return rng.sample(active, min(n, len(active)))


def measure_locality(engine: Engine, config: EvalConfig) -> list[dict[str, object]]:
    """Add random active features of every block to the left half of held-out one-step pictures.

    Returns:
        A row for each block and feature. `inside`: share of the squared change in that half (0.5: not local);
        `color` and `texture`: root mean square of the two parts of the change there, pictures in [-1, 1].
    """
    held, seeds = held_out(engine, config.locality_scenes)
    scenes = Scenes(held.codes, held.captions, seeds, held.noise)
    own = generate(engine, scenes, None, config.batch)
    width = own.shape[-1]
    inside = (torch.arange(width) < width // 2).expand(own.shape[-2], width)
    rng = random.Random(config.seed)
    rows: list[dict[str, object]] = []
    chosen = [
        (info, j) for info in engine.info.saes.values() for j in _active_features(info, config.locality_features, rng)
    ]
    for info, feature in tqdm(chosen, desc="locality", unit="feature"):
        features = (WeightedFeature(info.name, feature),)
        edit = Edit("add", features, config.locality_strength, Unit.NORM, _HALF)
        change = generate(engine, scenes, edit, config.batch) - own
        low, high = (part[..., inside] for part in split_by_frequency(change))
        row: dict[str, object] = {"block": info.hook_point, "feature": feature}
        if (share := share_inside(change, inside)) is not None:
            row["inside"] = round(share, 4)
        rows.append({**row, "color": round(_rms(low), 5), "texture": round(_rms(high), 5)})
    return rows
