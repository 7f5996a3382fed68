"""A random model with random SAEs: every number of an evaluation at its smallest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from turbolens_server.catalog.labels import FeatureLabels, Label, write_labels
from turbolens_server.engine.engine import Engine
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.bundle import FeatureStats, SaeWeights, save_bundle

D_SAE, K = 48, 4


def random_weights(d_model: int, seed: int) -> SaeWeights:
    g = torch.Generator().manual_seed(seed)
    rows = functional.normalize(torch.randn(D_SAE, d_model, generator=g), dim=1)
    return SaeWeights(rows.T.contiguous(), torch.zeros(D_SAE), rows, torch.randn(d_model, generator=g) * 0.1)


@pytest.fixture(scope="session")
def random_saes(tiny_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles for the hook points of the random model, with statistics and labels."""
    folder, info = tmp_path_factory.mktemp("saes"), tiny_engine.info
    for seed, point in enumerate(info.hook_points):
        ones = np.ones(D_SAE, np.float32)
        save_bundle(
            folder / point.name,
            hook_point=point.name,
            hook_module=point.module,
            model_name="random",
            model_hash=info.model_hash,
            architecture="topk",
            k=K,
            weights=random_weights(point.d_model, seed),
            stats=FeatureStats(2 * ones, 4 * ones, 0.1 * ones, np.array([999]), np.array([3.0], np.float32)),
            provenance={},
        )
        blue = Label("color", "blue", "thing", 0.9 - 0.1 * seed)
        write_labels(folder / point.name, [FeatureLabels(7, "blue (color of the thing)", blue.score, (blue,))])
    return folder


@pytest.fixture(scope="session")
def sae_engine(tiny_folder: Path, random_saes: Path) -> Engine:
    """The random model with its random SAEs."""
    return load_engine(model=str(tiny_folder), saes=[str(random_saes)])
