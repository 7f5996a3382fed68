"""Fill a cache from many machines with Ray Data: every worker has a model, and all write to one shared folder."""

from __future__ import annotations

import functools
import logging
from typing import Any, Final

from tqdm import tqdm

from turbolens_server.loading.errors import LoadError
from turbolens_training.activations.cached import CachedStream
from turbolens_training.activations.config import FillCacheConfig
from turbolens_training.activations.prompt_specs import open_prompts
from turbolens_training.activations.sources import open_model, open_streams

_TRAINING: Final = 0
_HELD_OUT: Final = 1


class ShardMaker:
    """One worker: makes the shards that it is told to, where the cache lacks them."""

    def __init__(self, config: FillCacheConfig) -> None:
        self._config = config

    @functools.cached_property
    def _parts(self) -> list[CachedStream]:
        """The caches of both parts; opened by the first call: a worker that fails at birth is born again for ever."""
        config = self._config
        prompts = open_prompts(config.prompts, seed=config.seed)
        streams = open_streams(open_model(config), config, prompts)
        return [CachedStream(stream, config.cache) for stream in streams]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make shard `index` of each `part`; gives back the folder that it is in, or what went wrong."""
        try:
            for part, index in zip(batch["part"], batch["index"], strict=True):
                self._parts[int(part)].fill(int(index))
            folders = [str(self._parts[int(part)].cache.folder) for part in batch["part"]]
        except (LoadError, ValueError) as error:  # what users can mend; Ray would bury it in its own report
            return {"folder": [""] * len(batch["part"]), "error": [str(error)] * len(batch["part"])}
        return {"folder": folders, "error": [""] * len(folders)}


def fill_with_ray(config: FillCacheConfig) -> list[str]:
    """Fill the caches of a run's two parts with `config.workers` workers; returns their folders.

    A cluster is joined where `RAY_ADDRESS` names one, else this machine is it. A worker takes one GPU where there are
    any and `device` does not say otherwise.

    Raises:
        ValueError: Ray is not installed, or a worker failed; the text is the worker's own.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--workers needs Ray; pip install 'turbolens[ray]'") from error
    ray.init(include_dashboard=False, logging_level=logging.WARNING)
    try:
        gpus = 1 if config.device != "cpu" and "GPU" in ray.cluster_resources() else 0
        shards = [{"part": _TRAINING, "index": index} for index in range(config.chunks)]
        shards += [{"part": _HELD_OUT, "index": index} for index in range(config.held_out_chunks)]
        made = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
            ShardMaker,
            fn_constructor_args=(config,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=config.workers),
            num_gpus=gpus,
        )
        folders: dict[str, None] = {}
        for row in tqdm(made.iter_rows(), total=len(shards), desc="shards", unit="shard"):
            if row["error"]:
                raise ValueError(row["error"])
            folders[row["folder"]] = None
        return list(folders)
    finally:
        ray.shutdown()
