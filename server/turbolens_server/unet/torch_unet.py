"""The U-Net in PyTorch: the tapped walk, launched as it goes, or on a GPU recorded once and replayed in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from turbolens_server.cuda_graphs import Cut, Recording, record
from turbolens_server.unet.backend import Tap
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.points import block_of
from turbolens_server.unet.tapped import Blocks, attention_blocks, tapped_forward


class TorchUNet:
    """The tapped walk, eager: features are read and edits made in the middle of the one pass."""

    takes_bias = True

    def __init__(self, unet: UNet2DConditionModel, blocks: Blocks | None = None, name: str = "torch") -> None:
        """`blocks` says how to run the U-Net's blocks; None: as its own modules do."""
        self.name = name
        self._unet = unet
        self._blocks = blocks
        self._order = [name for name, _, _ in attention_blocks(unet)]

    def predict(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> Tensor:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        return _whole(tapped_forward(self._unet, sample, timestep, conditions, tap=tap, at=tap.at, blocks=self._blocks))

    def read(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> None:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        tapped = {block_of(point) for point in tap.at}
        last = next((block for block in reversed(self._order) if block in tapped), None)
        if last is not None:
            tapped_forward(
                self._unet, sample, timestep, conditions, tap=tap, at=tap.at, stop_after=last, blocks=self._blocks
            )


@dataclasses.dataclass(frozen=True)
class _Pass:
    """Tensors of a recorded pass, which each replay writes anew."""

    prediction: Tensor  # [B, C, h, w]
    updates: tuple[tuple[str, Tensor, tuple[int, int]], ...]
    """Hook point, update [B, P, d_model] and grid, in order of execution: one at the end of each piece but the last."""


class GraphedUNet:
    """The tapped walk on a CUDA GPU, recorded for each batch size as graphs that end at the hook points.

    Between two graphs the tap reads and steers the update where it lies, so every edit, closed ones included, takes
    one pass, and none makes anything be recorded or compiled anew. A point with nothing to do costs one more launch.
    With a bias or gates a pass is launched as it goes: a recording for each number of tokens would take its memory for
    good. So is one that looks into an attention layer.
    """

    takes_bias = True

    def __init__(
        self, unet: UNet2DConditionModel, points: Sequence[str], blocks: Blocks | None = None, name: str = "torch"
    ) -> None:
        """`points` are the hook points that will ever be tapped; `blocks` and `name` as for :class:`TorchUNet`."""
        self.name = name
        self._unet = unet
        self._points = frozenset(points)
        self._blocks = blocks
        self._pool = torch.cuda.graph_pool_handle()
        self._eager = TorchUNet(unet, blocks, name)
        self._recorded: dict[tuple[int, ...], tuple[tuple[Tensor, ...], Recording[_Pass]]] = {}

    def predict(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> Tensor:
        """See :class:`turbolens_server.unet.backend.UNetBackend`; the next call overwrites what this returns."""
        if not conditions.plain or not tap.at <= self._points:
            return self._eager.predict(sample, timestep, conditions, tap)
        return self._replay(sample, timestep, conditions, tap).prediction

    def read(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> None:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        if not conditions.plain or not tap.at <= self._points:
            self._eager.read(sample, timestep, conditions, tap)
        else:
            self._replay(sample, timestep, conditions, tap)

    @torch.inference_mode()
    def _replay(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> _Pass:
        values = (sample, timestep.float().expand(len(sample)), *conditions.tensors())
        key = tuple(sample.shape)
        if key not in self._recorded:
            self._recorded[key] = self._record(values)
        inputs, recording = self._recorded[key]
        for static, value in zip(inputs, values, strict=True):
            static.copy_(value)
        first, *others = recording.pieces
        first.replay()
        for (point, update, grid), piece in zip(recording.result.updates, others, strict=True):
            if point in tap.at and (steered := tap(point, update, grid)) is not update:
                update.copy_(steered)
            piece.replay()
        return recording.result

    def _record(self, values: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Recording[_Pass]]:
        sample, *conditions = values
        inputs = (
            sample.clone(memory_format=torch.channels_last if self._blocks else torch.contiguous_format),
            *(value.clone(memory_format=torch.contiguous_format) for value in conditions),
        )

        def run(cut: Cut) -> _Pass:
            updates: list[tuple[str, Tensor, tuple[int, int]]] = []

            def end_piece(point: str, update: Tensor, grid: tuple[int, int]) -> Tensor:
                updates.append((point, update, grid))
                cut()
                return update

            latents, timestep, *heard = inputs
            whole = tapped_forward(
                self._unet, latents, timestep, Conditions(*heard),
                tap=end_piece, at=self._points, blocks=self._blocks,
            )  # fmt: skip
            return _Pass(_whole(whole), tuple(updates))

        return inputs, record(run, self._pool)


def _whole(prediction: Tensor | None) -> Tensor:
    if prediction is None:
        raise AssertionError("a pass that is not stopped predicts")
    return prediction
