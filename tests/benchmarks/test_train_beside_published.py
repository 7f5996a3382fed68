"""The pipeline that we measure against makes what we make, and everything that it costs is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.report import section
from benchmarks.train_beside_published import Published, run
from turbolens_server.loading.model import load_pipeline
from turbolens_training.activations.prompts import ScenePrompts
from turbolens_training.activations.sources import open_streams
from turbolens_training.sae.config import SaeConfig

CONFIG = SaeConfig(
    device="cpu", d_sae=32, k=4, images=2, one_step_share=1.0, batch=64, steps_per_chunk=2, reservoir=128, warm_up=2,
    held_out_chunks=1,
)  # fmt: skip


@pytest.mark.parametrize("lean", [False, True])
def test_it_reads_from_its_disk_what_we_train_on(lean: bool, engine, tmp_path: Path) -> None:
    stream, _ = open_streams(engine, CONFIG, ScenePrompts())
    pipeline, _ = load_pipeline("mini", torch.device("cpu"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = Published(stream, pipeline, engine.info.hook_points, CONFIG, tmp_path, lean=lean)
    theirs.collect(2)
    for tar in theirs._tars.values():
        tar.close()
    assert {path.name for path in tmp_path.iterdir()} >= {"down_2_1.tar", "mid_0.tar"}
    for block in ("down.2.1", "mid.0"):
        expected = torch.cat([stream.tokens(index, 64)[block] for index in range(2)])
        # Every batch of one reading, in another order.
        batches = theirs._read(block)
        read = torch.cat([next(batches) for _ in range(len(expected) // CONFIG.batch)])
        near = torch.cdist(expected, read, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        scale = expected.norm(dim=1).mean()
        assert near.values.max() < (2e-3 if lean else 1e-4) * scale
        assert len(near.indices.unique()) == len(expected)
    tokens = 2 * 2 * 64 * len(stream.widths) * 128
    assert theirs.written > tokens * (2 if lean else 8)


@pytest.mark.interop
def test_all_learn_and_what_they_cost_is_told(tmp_path: Path) -> None:
    result = run(1, 2, ("torch",), CONFIG)
    (case,) = result["cases"]
    names = ["published", "published, lean", "TurboLens"]
    assert [row["name"] for row in case["rows"]] == names
    assert case["label"] == {"prompts": 2 * (1 + 4), "steps": 8}
    assert all(set(case[what]) == set(names) for what in ("bytes", "pictures_ms", "explained"))
    for row in case["rows"]:
        # A part of the whole; but of other chunks, in which a machine may be slower.
        assert 0 < case["pictures_ms"][row["name"]] < 3 * row["median_ms"]
    assert case["bytes"]["published"] > case["bytes"]["published, lean"]
    (tmp_path / "whole.json").write_text(json.dumps(result))
    told = section("whole", tmp_path, tmp_path)
    assert "GB written for a million tokens of each block" in told
    assert told.count("explained variance") == len(names)
