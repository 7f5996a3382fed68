"""Training data of temporal SAEs: whole runs at a position, where others take each step by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from turbolens_server.sae.temporal import side_by_side
from turbolens_training.activations.sources import ChunkSource


def sample_temporal(
    by_block: Mapping[str, Tensor | tuple[Tensor, ...]], index: int, per_image: int
) -> dict[str, Tensor]:
    """Updates as training data: `per_image` positions of each picture, with all steps of each, by hook point.

    Args:
        by_block: by hook point, [T, N, P, d_model] or T of [N, P, d_model].
        index: of the chunk, which decides the positions.
        per_image: positions of a picture, at most; all where the grid has no more.

    Returns:
        By hook point, [N * per_image, T * d_model] float32.
    """
    taken = {}
    for name, updates in by_block.items():
        images, positions, width = updates[0].shape
        order = torch.rand(images, positions, generator=torch.Generator().manual_seed(index)).argsort(1)
        picks = order[:, :per_image, None].expand(-1, -1, width).to(updates[0].device)
        taken[name] = side_by_side([at_step.gather(1, picks) for at_step in updates]).flatten(0, 1)
    return taken


class TemporalSource:
    """The runs of a source whose pictures all take the same number of steps."""

    def __init__(self, source: ChunkSource, steps: int) -> None:
        self._source = source
        self._steps = steps
        self.widths = {name: steps * width for name, width in source.widths.items()}
        self.identity = source.identity
        self.kind = source.kind

    def tokens(self, index: int, per_image: int) -> dict[str, Tensor]:
        """Chunk `index` as training data, see :func:`sample_temporal`.

        Raises:
            ValueError: it is of another number of steps, as a cache's may be.
        """
        updates = self._source.updates(index)
        if len(updates.timesteps) != self._steps:
            raise ValueError(f"chunk {index} is of {len(updates.timesteps)} steps, and these SAEs read {self._steps}")
        return sample_temporal(updates.by_block, index, per_image)
