"""`turbolens train cache`: fill a cache, check one, import one."""

from __future__ import annotations

import sys

from tqdm import tqdm

from turbolens_training.activations.cache import find_caches
from turbolens_training.activations.cached import CachedStream
from turbolens_training.activations.config import FillCacheConfig, ImportTarsConfig, VerifyCacheConfig
from turbolens_training.activations.prompt_specs import open_prompts
from turbolens_training.activations.reference_tars import import_tars
from turbolens_training.activations.sources import open_model, open_streams


def fill(config: FillCacheConfig) -> None:
    """Make what the caches of a run's two parts lack."""
    if config.workers:
        from turbolens_training.activations.ray_collect import fill_with_ray

        for folder in fill_with_ray(config):
            config.tell(folder, cache=folder)
        return
    prompts = open_prompts(config.prompts, seed=config.seed)
    streams = open_streams(open_model(config), config, prompts)
    for stream, chunks in zip(streams, (config.chunks, config.held_out_chunks), strict=True):
        cached = CachedStream(stream, config.cache)
        for index in tqdm(range(chunks), desc=stream.split, unit="chunk"):
            cached.fill(index)
        config.tell(cached.cache.folder, cache=cached.cache.folder)


def verify(config: VerifyCacheConfig) -> None:
    """Say everything that is wrong; exit with 1 where something is."""
    count = 0
    for cache in find_caches(config.path):
        for problem in cache.problems():
            count += 1
            config.tell(problem, cache=cache.folder, problem=str(problem))
        shards = len(cache.shards())
        config.tell(f"{cache.folder}: {shards} shards read", cache=cache.folder, shards=shards)
    if count:
        sys.exit(f"turbolens train cache verify: {count} problem{'s'[: count > 1]}")


def import_reference(config: ImportTarsConfig) -> None:
    """Make a cache of the reference's tars."""
    cache = import_tars(config.path, config.cache)
    shards = len(cache.shards())
    line = f"{cache.folder}: {shards} shards; train on them with `turbolens train sae --shards`"
    config.tell(line, cache=cache.folder, shards=shards)
