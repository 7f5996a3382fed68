"""The U-Net in PyTorch: the tapped walk as it is, or compiled with its steering as inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from turbolens_server.unet.backend import Affine, Tap, steered_passes
from turbolens_server.unet.graph import GraphSpec, SteerableUNet
from turbolens_server.unet.tapped import tapped_forward


class TorchUNet:
    """The tapped walk, eager: features are read and edits made in the middle of the one pass."""

    name = "torch"

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._unet = unet

    def predict(
        self, sample: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, time_ids: Tensor, tap: Tap
    ) -> Tensor:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        prediction = tapped_forward(self._unet, sample, timestep, text, pooled, time_ids, tap=tap, at=tap.at)
        if prediction is None:
            raise AssertionError("a pass that is not stopped predicts")
        return prediction


class CompiledTorchUNet:
    """The walk as one compiled graph whose gains and biases are inputs, so that no edit makes it compile anew.

    Meant for CUDA, and not yet run on it: `reduce-overhead` replays the graph as one CUDA graph a shape, from static
    buffers of its own. Batches with a closed edit take the eager walk: one pass, where the graph would need several.
    """

    name = "torch-compile"

    def __init__(self, unet: UNet2DConditionModel, spec: GraphSpec, **options: Any) -> None:
        """`options` go to `torch.compile`."""
        self._eager = TorchUNet(unet)
        self._spec = spec
        graph = SteerableUNet(unet, spec)
        self._graph: Callable[..., tuple[Tensor, ...]] = torch.compile(graph, fullgraph=True, **options)

    def predict(
        self, sample: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, time_ids: Tensor, tap: Tap
    ) -> Tensor:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        if tap.closed:
            return self._eager.predict(sample, timestep, text, pooled, time_ids, tap)
        timesteps = timestep.float().expand(len(sample)).contiguous()
        points = len(self._spec.points)

        def run(steering: Mapping[str, Affine], _: Sequence[str]) -> dict[str, Tensor]:
            # Contiguous like the ones and zeros of points that are not steered: other strides would compile anew.
            inputs = tuple(tensor.contiguous() for tensor in self._spec.steering_inputs(steering, sample).values())
            torch.compiler.cudagraph_mark_step_begin()
            outputs = self._graph(sample, timesteps, text, pooled, time_ids, inputs[:points], inputs[points:])
            return dict(zip(self._spec.output_names(), outputs, strict=True))

        return steered_passes(run, self._spec.grids(sample), tap)
