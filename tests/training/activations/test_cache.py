from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolens_server.engine.engine import Engine
from turbolens_training.activations.cache import CacheError, ShardCache, cache_key, find_caches
from turbolens_training.activations.cached import CachedStream, ShardSource
from turbolens_training.activations.prompts import ScenePrompts
from turbolens_training.activations.stream import PromptStream, Updates, sample_tokens

HALF_ULP = 2.0**-11
SMALLEST = 2.0**-25  # half of float16's smallest step


def stream(engine: Engine, **changes) -> PromptStream:
    settings = {"seed": 1, "split": "training", "images": 2, "one_step_share": 0.5, "multi_steps": (2, 3)}
    return PromptStream(engine, ScenePrompts(), **{**settings, **changes})


def some_updates() -> Updates:
    g = torch.Generator().manual_seed(0)
    by_block = {
        "a": torch.randn(2, 3, 4, 8, generator=g),
        "b.0": torch.randn(2, 3, 9, 5, generator=g),
    }
    return Updates(("x", "", "漢字 🦊"), (1, 2**62 - 1, 0), torch.zeros(3, 1), (999, 998), by_block)


def some_cache(folder: Path, shards: int = 1) -> ShardCache:
    cache = ShardCache.create(folder, {"model_hash": "m", "n": 1})
    for index in range(shards):
        cache.write(index, some_updates())
    return cache


def test_a_cached_stream_gives_the_batches_of_the_stream(tiny_engine: Engine, tmp_path: Path) -> None:
    plain, cached = stream(tiny_engine), CachedStream(stream(tiny_engine), tmp_path)
    assert {plain.steps_of(index) for index in range(4)} > {1}
    for index in range(4):
        for _ in range(2):  # made, then read
            ours, theirs = cached.tokens(index, 5), plain.tokens(index, 5)
            assert list(ours) == list(theirs)
            for name, tokens in ours.items():
                assert tokens.dtype == torch.float32
                error = (tokens - theirs[name]).abs()
                assert (error <= HALF_ULP * theirs[name].abs() + SMALLEST).all()
    read, made = cached.updates(2), plain.updates(2)
    assert (read.captions, read.seeds, read.timesteps) == (made.captions, made.seeds, made.timesteps)
    assert not list(cached.cache.problems())


def test_what_is_cached_is_not_made_again(tiny_engine: Engine, tmp_path: Path) -> None:
    first = CachedStream(stream(tiny_engine), tmp_path).tokens(0, 3)

    class Broken(PromptStream):
        def updates(self, index):
            raise AssertionError("made again")

    settings = {"seed": 1, "split": "training", "images": 2, "one_step_share": 0.5, "multi_steps": (2, 3)}
    again = CachedStream(Broken(tiny_engine, ScenePrompts(), **settings), tmp_path)
    assert all(torch.equal(first[name], tokens) for name, tokens in again.tokens(0, 3).items())
    with pytest.raises(AssertionError, match="made again"):
        again.tokens(1, 3)


def test_another_recipe_is_another_cache(tiny_engine: Engine, tmp_path: Path) -> None:
    changes = ({}, {"seed": 2}, {"split": "held out"}, {"images": 3}, {"one_step_share": 0.4}, {"multi_steps": (2, 4)})
    keys = {cache_key(stream(tiny_engine, **change).recipe()) for change in changes}
    assert len(keys) == len(changes)
    assert cache_key({"b": 1, "a": 2}) == cache_key({"a": 2, "b": 1})


def test_a_shard_comes_back_as_it_was(tmp_path: Path) -> None:
    some_cache(tmp_path)
    (cache,) = find_caches(tmp_path)
    shard, updates = cache.read(0), some_updates()
    assert (shard.captions, shard.seeds, shard.timesteps) == (updates.captions, updates.seeds, updates.timesteps)
    for name, steps in shard.by_block.items():
        assert torch.equal(torch.stack(steps), updates.by_block[name].half())
    assert cache.shards() == [0]
    assert 1 not in cache
    with pytest.raises(CacheError, match="no shard 1"):
        cache.read(1)


def test_a_writer_that_was_slower_changes_nothing(tmp_path: Path) -> None:
    cache = some_cache(tmp_path)
    cache.write(0, dataclasses.replace(some_updates(), captions=("other",) * 3))
    assert cache.read(0).captions[0] == "x"
    assert [path.name for path in (cache.folder / "shards").iterdir()] == ["00000000"]


@pytest.mark.parametrize("value", [70_000.0, -1e9, float("nan"), float("inf")])
def test_what_float16_cannot_hold_is_refused(tmp_path: Path, value: float) -> None:
    cache, updates = some_cache(tmp_path), some_updates()
    updates.by_block["b.0"][1, 2, 3, 4] = value
    with pytest.raises(CacheError, match=r"b\.0, step 1: the update reaches"):
        cache.write(7, updates)
    assert cache.shards() == [0]
    assert not list(cache.problems())


def test_a_disk_that_fails_leaves_no_part_of_a_shard(tmp_path: Path, full_disk) -> None:
    """The system itself refuses the write: here by its limit on the size of a file."""
    cache = some_cache(tmp_path)
    told = r"00000007: cannot be written \(File too large; .* MB free\); make room"
    with full_disk(200), pytest.raises(CacheError, match=told):
        cache.write(7, some_updates())
    assert cache.shards() == [0]
    assert not list(cache.problems())


def test_a_shard_that_was_never_finished_is_not_read_but_told(tmp_path: Path) -> None:
    cache = some_cache(tmp_path)
    (cache.folder / "shards" / ".00000001-abc").mkdir()
    assert cache.shards() == [0]
    assert 1 not in cache
    assert [problem for problem in cache.problems() if "cut off" in problem]


@settings(max_examples=15)
@given(st.data())
def test_verify_finds_any_changed_byte(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    cache = some_cache(tmp_path_factory.mktemp("cache"))
    assert not list(cache.problems())
    files = sorted(path for path in (cache.folder / "shards" / "00000000").iterdir() if path.name != "shard.json")
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert any(str(path.parent) in problem for problem in cache.problems())


def test_a_file_cut_short_is_never_read(tmp_path: Path) -> None:
    cache = some_cache(tmp_path)
    for path in sorted((cache.folder / "shards" / "00000000").iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(CacheError, match=path.name):
            cache.read(0)
        assert list(cache.problems())
        path.write_bytes(content)
    path.unlink()
    with pytest.raises(CacheError, match=path.name):
        cache.read(0)


@pytest.mark.parametrize("manifest", ["{}", '{"files": 3}', '{"files": {"pictures.parquet": {}}}', "[]", "3"])
def test_a_shards_manifest_of_another_form_is_one_line(tmp_path: Path, manifest: str) -> None:
    cache = some_cache(tmp_path)
    (cache.folder / "shards" / "00000000" / "shard.json").write_text(manifest)
    with pytest.raises(CacheError, match=r"shard\.json: "):
        cache.read(0)
    assert list(cache.problems())


def test_whoever_the_umask_allows_may_read_a_cache(tmp_path: Path) -> None:
    """As the training of another account of the same machine, or in a container."""
    before = os.umask(0o022)
    try:
        cache = some_cache(tmp_path)
    finally:
        os.umask(before)
    for path in [cache.folder, *cache.folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)


def test_a_folder_that_is_no_cache_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no activation cache"):
        find_caches(tmp_path)
    cache = some_cache(tmp_path)
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    (cache.folder / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(CacheError, match="not version 1"):
        ShardCache(cache.folder)
    (cache.folder / "manifest.json").write_text("{")
    with pytest.raises(CacheError, match=r"manifest\.json: cannot be read"):
        ShardCache(cache.folder)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CacheError, match="cannot be written"):
        ShardCache.create(blocked, {})


def test_a_recipe_that_was_edited_is_found(tmp_path: Path) -> None:
    cache = some_cache(tmp_path)
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    manifest["recipe"]["n"] = 2
    (cache.folder / "manifest.json").write_text(json.dumps(manifest))
    assert any("do not agree" in problem for problem in ShardCache(cache.folder).problems())


def test_a_cache_alone_is_a_source_with_a_held_out_part(tmp_path: Path) -> None:
    cache = some_cache(tmp_path, shards=22)
    training, held_out = ShardSource(cache, held_out=False), ShardSource(cache, held_out=True)
    assert (training.chunks, held_out.chunks) == (20, 2)
    assert training.widths == {"a": 8, "b.0": 5}
    expected = sample_tokens(cache.read(2).by_block, 1, 2)
    assert torch.equal(training.tokens(1, 2)["a"], expected["a"])
    assert training.updates(20).seeds == training.updates(0).seeds
    with pytest.raises(CacheError, match="at least 2"):
        ShardSource(some_cache(tmp_path / "small"), held_out=False)
