"""The data of a run, as its settings say: a stream of pictures, a cache over it, or a cache alone."""

from __future__ import annotations

import sys
from typing import Protocol

from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_server.loading.load import load_engine
from turbolens_training.activations.cache import ShardCache
from turbolens_training.activations.cached import CachedStream, ShardSource
from turbolens_training.activations.config import DataConfig
from turbolens_training.activations.prompts import PromptSource
from turbolens_training.activations.stream import HELD_OUT, TRAINING, PromptStream, StepUpdates


class TokenSource(Protocol):
    """Where training data comes from: a chunk is a function of its index."""

    widths: dict[str, int]
    """d_model of each hook point."""
    identity: str
    """What the data comes from; a run goes on only with the same."""
    kind: str
    """What the data is, in words, for the provenance of what is trained on it."""

    def tokens(self, index: int, per_image: int) -> dict[str, Tensor]:
        """Tokens [n, d_model] of every hook point."""
        ...


class ChunkSource(TokenSource, Protocol):
    """Training data that is also there in whole chunks, for measurement."""

    @property
    def chunks(self) -> int | None:
        """Different chunks there are; None: without end."""
        ...

    def updates(self, index: int) -> StepUpdates:
        """Chunk `index`, the same every time."""
        ...


def open_model(config: DataConfig, device: str | None = None) -> Engine:
    """The model of a run, without SAEs, on the settings' device or another; its sampler can take the run's steps.

    Raises:
        LoadError: it cannot be loaded.
    """
    return load_engine(
        model=config.model,
        device=config.device if device is None else device,
        variant=config.variant,
        saes=[],
        backend=config.backend,
        hook_points=config.hook_points,
        max_steps=config.most_steps,
    )


def open_streams(engine: Engine, config: DataConfig, prompts: PromptSource) -> tuple[PromptStream, PromptStream]:
    """The streams of pictures to train on and to hold out: the same mix of steps, and no prompt of a file in both."""
    if prompts.summary:
        print(prompts.summary, file=sys.stderr)
    one_step_share, multi_steps = config.step_mix
    training, held_out = (
        PromptStream(
            engine,
            prompts,
            seed=config.seed,
            split=split,
            images=config.images,
            one_step_share=one_step_share,
            multi_steps=multi_steps,
        )
        for split in (TRAINING, HELD_OUT)
    )
    return training, held_out


def open_sources(
    engine: Engine, config: DataConfig, data: PromptSource | ShardCache
) -> tuple[ChunkSource, ChunkSource]:
    """What to train on, and what is held out.

    Args:
        engine: the model, at whose hook points the data is.
        config: of the data.
        data: prompts to make pictures of, or a cache to take as it is.

    Raises:
        CacheError: the cache cannot be read or written.
        ValueError: the shards are of another model.
    """
    if isinstance(data, ShardCache):
        return _open_shards(engine, data)
    streams = open_streams(engine, config, data)
    if config.cache is None:
        return streams
    training, held_out = (CachedStream(stream, config.cache) for stream in streams)
    return training, held_out


def _open_shards(engine: Engine, cache: ShardCache) -> tuple[ShardSource, ShardSource]:
    """A cache alone, checked against the model whose SAEs these will be."""
    training, held_out = (ShardSource(cache, held_out=held_out) for held_out in (False, True))
    made_by = cache.recipe.get("model_hash")
    if made_by not in (None, engine.info.model_hash):
        raise ValueError(f"{cache.folder}: made by model {str(made_by)[:12]}, not {engine.info.model_hash[:12]}")
    widths = {point.name: point.d_model for point in engine.info.hook_points}
    if training.widths != widths:
        raise ValueError(f"{cache.folder}: holds {training.widths}, the model's hook points are {widths}")
    return training, held_out
