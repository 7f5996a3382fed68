"""A hand on every hook point of a whole batch: what training keeps, and what evaluation does to updates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.walk import Walk

Intervention = Callable[[int, str, Tensor], Tensor]
"""(step, hook point, update [N, P, d_model]) -> the update to add instead, in any float type."""


@torch.inference_mode()
def begin(engine: Engine, captions: Sequence[str], seeds: Sequence[int], steps: int) -> Walk:
    """A walk at the model's default size; the same seed gives the engine's own first noise.

    What no caption may lose unseen is warned of, once in a process: the end of one that is longer than the model reads.
    """
    encoder = engine.components.text
    text = encoder.encode_together(captions)
    if any(text.tokens_cut):
        reads = f"the {encoder.max_tokens} tokens that the model reads"
        warnings.warn(f"prompts are longer than {reads}: the end of such a prompt does not reach it", stacklevel=2)
    return engine.begin(text, seeds, steps)


class HookPointTap:
    """Sees every hook point of a walk, step after step: see :class:`turbolens_server.unet.backend.Tap`."""

    def __init__(self, points: Sequence[str], *, keep: bool = False, intervene: Intervention | None = None) -> None:
        """Set what to do.

        Args:
            points: hook points, in order of execution.
            keep: keep the updates.
            intervene: what is added in place of each update.
        """
        self._intervene = intervene
        self._keep = keep
        self._seen = dict.fromkeys(points, 0)
        self._kept: dict[str, list[Tensor]] = {point: [] for point in points}
        self.at = frozenset(points if keep or intervene else ())
        self.closed = frozenset(points if intervene else ())

    def __call__(self, point: str, update: Tensor, grid: tuple[int, int]) -> Tensor:
        """Keep the update [N, P, d_model] of a hook point as it was, and say what to add instead."""
        step = self._seen[point]
        self.read(point, update, grid)
        return update if self._intervene is None else self._intervene(step, point, update).to(update.dtype)

    def read(self, point: str, update: Tensor, grid: tuple[int, int]) -> None:
        """Keep the update [N, P, d_model] of a hook point."""
        self._seen[point] += 1
        if self._keep:
            # A recording writes its next update over this one, and `float` copies halves alone.
            self._kept[point].append(update.float() if update.dtype != torch.float32 else update.clone())

    def affine(self, point: str, grid: tuple[int, int]) -> None:
        """No edit is known before the pass."""

    def updates(self) -> dict[str, Tensor]:
        """What was kept: by hook point, [T, N, P, d_model] float32."""
        return {point: torch.stack(kept) for point, kept in self._kept.items()} if self._keep else {}
