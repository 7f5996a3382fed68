"""Training data from a cache: a stream that keeps what it made, and a cache as it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from turbolens_training.activations.cache import CacheError, ShardCache, StoredUpdates
from turbolens_training.activations.prompts import HELD_OUT_ONE_IN
from turbolens_training.activations.stream import PromptStream, sample_tokens


class CachedStream:
    """A stream over a cache: a chunk that is in it is read, any other is made and written first.

    Either way it is what float16 leaves of it, so that a run does not depend on what was cached when it began.
    """

    def __init__(self, stream: PromptStream, root: Path) -> None:
        """`root`: a folder of caches, of which the stream's recipe says which is its own."""
        self._stream = stream
        self.cache = ShardCache.create(root, stream.recipe())
        self.widths = stream.widths
        self.identity = f"{stream.identity}/float16"
        self.kind = stream.kind
        self.chunks = stream.chunks

    def fill(self, index: int) -> None:
        """Make chunk `index` where the cache lacks it."""
        if index not in self.cache:
            self.cache.write(index, self._stream.updates(index))

    def updates(self, index: int) -> StoredUpdates:
        """Chunk `index`, the same every time."""
        self.fill(index)
        return self.cache.read(index)

    def tokens(self, index: int, per_image: int) -> dict[str, Tensor]:
        """Chunk `index` as training data, see :func:`sample_tokens`."""
        return sample_tokens(self.updates(index).by_block, index, per_image)


class ShardSource:
    """The shards of a cache, again and again: training data that needs no model."""

    def __init__(self, cache: ShardCache, *, held_out: bool) -> None:
        """`held_out`: of every `HELD_OUT_ONE_IN` shards the first, else the others.

        Raises:
            CacheError: there are too few shards to hold one out.
        """
        shards = cache.shards()
        self._shards = [n for place, n in enumerate(shards) if (place % HELD_OUT_ONE_IN == 0) == held_out]
        if not self._shards:
            raise CacheError(f"{cache.folder}: {len(shards)} shards; at least 2 are needed to hold one out")
        self._cache = cache
        self.chunks = len(self._shards)
        first = cache.read(shards[0]).by_block
        self.widths = {block: updates[0].shape[-1] for block, updates in first.items()}
        self.identity = f"{cache.key}/{hashlib.sha256(str(shards).encode()).hexdigest()}"
        self.kind = f"activation cache {cache.key}"

    def updates(self, index: int) -> StoredUpdates:
        """Shard number `index` of this part, from the start again after the last."""
        return self._cache.read(self._shards[index % len(self._shards)])

    def tokens(self, index: int, per_image: int) -> dict[str, Tensor]:
        """Chunk `index` as training data; the next time round other positions of the same pictures."""
        return sample_tokens(self.updates(index).by_block, index, per_image)
