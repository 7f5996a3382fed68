"""Collection by several Ray workers, on a Ray that runs on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbolens_server.loading.load import load_engine
from turbolens_training.activations.cache import ShardCache
from turbolens_training.activations.cached import CachedStream
from turbolens_training.activations.config import FillCacheConfig
from turbolens_training.activations.prompts import ScenePrompts
from turbolens_training.activations.ray_collect import fill_with_ray
from turbolens_training.activations.sources import open_streams

pytestmark = pytest.mark.ray


def test_workers_fill_the_cache_that_one_process_would(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    config = FillCacheConfig(
        model=str(tiny_folder), device="cpu", cache=tmp_path / "ray", images=2, chunks=3, held_out_chunks=1, workers=2
    )
    folders = fill_with_ray(config)
    caches = [ShardCache(Path(folder)) for folder in folders]
    assert sorted(len(cache.shards()) for cache in caches) == [1, 3]
    assert not [problem for cache in caches for problem in cache.problems()]
    streams = open_streams(load_engine(model=config.model, device="cpu", saes=[]), config, ScenePrompts())
    for stream, name in zip(streams, ("training", "held out"), strict=True):
        ours = CachedStream(stream, tmp_path / "ray")
        assert str(ours.cache.folder) in folders, name
        here = CachedStream(stream, tmp_path / "here").tokens(0, 4)
        for block, tokens in ours.tokens(0, 4).items():
            assert (tokens - here[block]).abs().max() <= 2e-3 * here[block].abs().max()


def test_a_worker_that_fails_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "few.txt").write_text("one\n")
    config = FillCacheConfig(
        model=str(tiny_folder), device="cpu", cache=tmp_path, prompts=str(tmp_path / "few.txt"), chunks=1, workers=1
    )
    with pytest.raises(ValueError, match="1 distinct prompts are too few") as caught:
        fill_with_ray(config)
    assert "\n" not in str(caught.value)
