from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from turbolens_server.catalog.labels import Label, read_labels, write_labels
from turbolens_training.catalog.cells import BACKGROUND, EDGE, cell_owners
from turbolens_training.catalog.config import BuildConfig
from turbolens_training.catalog.labels import GroundTruth, bits, label_features
from turbolens_training.measures.ranking import Active
from turbolens_training.mini.scenes import BACKGROUND as BACKGROUND_COLUMN
from turbolens_training.mini.scenes import (
    COLORS,
    Scene,
    Thing,
    encode_scenes,
    jitter_from_noise,
    sample_codes,
    thing_column,
)

GRID = (8, 8)


def test_cells_belong_to_the_thing_that_covers_them() -> None:
    pair = (Thing("square", size="big"), Thing("circle", size="small"))
    scenes = [Scene(pair, "left of"), Scene(pair, "above"), Scene((Thing("square"),), "right"), Scene()]
    owners = cell_owners(encode_scenes(scenes), torch.zeros(4, 16), GRID).unflatten(1, GRID)
    assert set(owners[0, :, :4].unique().tolist()) <= {0, BACKGROUND, EDGE}
    assert (owners[0, 3:5, 2] == 0).all()
    assert (owners[0, 3:5, 5] == 1).all()
    assert (owners[1, 1:3, 3:5] == 0).all()
    assert (owners[1, 5:7, 3:5] == 1).all()
    assert (owners[2, 3:5, 5] == 0).all()
    assert (owners[3] == BACKGROUND).all()


def test_planted_features_get_their_labels(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    codes = sample_codes(300, g)
    owners = cell_owners(codes, jitter_from_noise(torch.randn(300, 4, 32, 32, generator=g)), GRID)
    blue = COLORS.index("blue")
    first, second = (codes[:, thing_column(slot, "color")] == blue for slot in range(2))
    columns = torch.arange(64) % 8
    dense = torch.stack(
        [
            torch.where(owners == 0, first[:, None], (owners == 1) & second[:, None]),
            (owners == BACKGROUND) & (codes[:, BACKGROUND_COLUMN] == 2)[:, None],
            owners >= 0,
            (columns < 4).expand(300, -1),
            torch.rand(300, 64, generator=g) < 0.3,
            torch.zeros(300, 64, dtype=torch.bool),
        ],
        -1,
    ).flatten(0, 1)  # [cells, features]
    noisy = dense * (0.5 + torch.rand(dense.shape, generator=g))
    cells, features = noisy.nonzero(as_tuple=True)
    active = Active(cells, features, noisy[cells, features], len(noisy))
    rows = label_features(active, GroundTruth(codes, owners, GRID), 6, BuildConfig())
    labels = [row.label for row in rows]
    assert labels[:4] == ["blue (color of the thing)", "night background", "on a thing", "left half of the picture"]
    assert labels[4:] == ["", ""]
    assert rows[0].labels[0] == Label("color", "blue", "thing", 1.0)
    assert rows[5].labels == ()

    write_labels(tmp_path, rows)
    back = read_labels(tmp_path, 6)
    assert [row.label for row in back.values()] == labels
    assert back[1].label_score == pytest.approx(rows[1].label_score)
    assert back[1].labels[0].value == "night"


def test_bits_are_none_at_chance_and_all_when_certain() -> None:
    assert bits(torch.tensor([0.5, 1.0]), 8).tolist() == pytest.approx([0, 3], abs=1e-6)
    assert bits(torch.tensor([0.9]), 2).item() == pytest.approx(
        1 + 0.9 * math.log2(0.9) + 0.1 * math.log2(0.1), abs=1e-6
    )
