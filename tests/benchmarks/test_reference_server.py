"""The approach that we measure against does the same work as we do: same pictures, same features, edits included."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from benchmarks.reference_server import AddEdit, ReferenceServer
from turbolens_server.bench.contenders import largest_difference
from turbolens_server.engine.types import Job
from turbolens_server.loading.model import load_pipeline
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import Box, BoxMask

PROMPT = "a big red star on the left, night background"
LEFT = BoxMask((Box(0, 0, 0.5, 1),))


@pytest.fixture(scope="module")
def reference(engine):
    pipeline, _ = load_pipeline("mini", torch.device("cpu"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    bundles = {name: sae.bundle for name, sae in engine.info.saes.items()}
    return ReferenceServer(pipeline, engine.info.hook_points, bundles)


def dense(codes) -> np.ndarray:
    """Our sparse codes as the reference gives them: [height, width, d_sae]."""
    grid = np.zeros((codes.height * codes.width, codes.d_sae), np.float32)
    grid[np.repeat(np.arange(len(grid)), codes.counts), codes.indices] = codes.values
    return grid.reshape(codes.height, codes.width, codes.d_sae)


@pytest.mark.parametrize("steered", [False, True])
def test_pictures_and_features_are_ours(steered, engine, reference):
    amount, seed, steps = 20.0, 7, 2
    point = next(point for point in engine.info.hook_points if point.name == "mid.0")
    mask = LEFT.on_grid(*point.grid(*engine.info.default_size))
    theirs = reference.generate(PROMPT, seed, steps, [AddEdit("mid.0", 5, amount, mask)] if steered else [])
    edit = Edit("add", (WeightedFeature("mid.0", 5),), amount, Unit.RAW, LEFT)
    job = Job(
        PROMPT, seed, steps, *engine.info.default_size, edits=(edit,) if steered else (), saes=tuple(engine.info.saes)
    )
    ours = engine.run([job])[0]
    assert largest_difference([ours.picture], [theirs.picture]) <= 2
    for codes in ours.features:
        found, expected = dense(codes), theirs.features[codes.sae][codes.step]
        assert found.shape == expected.shape
        scale = expected.max()
        # Where two features tie, rounding picks: then both are at the least activation kept there.
        near = np.isclose(found, expected, atol=1e-3 * scale) | (np.abs(found - expected) <= _least(expected))
        assert near.all()
        assert (np.abs(found - expected) > 1e-3 * scale).mean() < 1e-4


def _least(rows: np.ndarray) -> np.ndarray:
    """The least activation kept at each position, with room for rounding."""
    return 1.01 * np.where(rows > 0, rows, np.inf).min(-1, keepdims=True)


def test_an_edit_changes_its_picture(reference):
    mask = np.ones((8, 8), np.float32)
    plain = reference.generate(PROMPT, 7, 1)
    steered = reference.generate(PROMPT, 7, 1, [AddEdit("mid.0", 5, 200.0, mask)])
    assert largest_difference([plain.picture], [steered.picture]) > 10
    assert not np.array_equal(plain.features["up.0.1"], steered.features["up.0.1"])


def test_callers_at_once_get_what_each_asked_for_and_no_hook_stays(reference):
    alone = [reference.generate(PROMPT, seed, 1).picture for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda seed: reference.generate(PROMPT, seed, 1).picture, range(2)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not any(module._forward_hooks for module in reference._pipeline.unet.modules())
