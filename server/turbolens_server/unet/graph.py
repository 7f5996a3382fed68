"""The U-Net as one closed graph: gains and biases in, prediction and updates out. What compilers and exporters see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from turbolens_server.unet.backend import PREDICTION, Affine, Tap, steered_passes, to_tokens, update_name
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.points import HookPoint
from turbolens_server.unet.tapped import tapped_forward


@dataclasses.dataclass(frozen=True)
class GraphPoint:
    """A hook point as the graph has it."""

    name: str
    d_model: int
    stride: int
    """Latent cells per cell of the grid, each way."""


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """The shapes of a graph's inputs and outputs."""

    points: tuple[GraphPoint, ...]
    """In order of execution."""
    channels: int
    """Of the latent."""
    stride: int
    """A latent's height and width are multiples of it."""
    tokens: int
    """Of the text."""
    text_dim: int
    pooled_dim: int

    @classmethod
    def of(cls, unet: UNet2DConditionModel, points: Sequence[HookPoint], vae_downscale: int, tokens: int) -> GraphSpec:
        """The spec of a U-Net with these hook points (in order of execution) and texts of `tokens` tokens."""
        config = unet.config
        return cls(
            points=tuple(GraphPoint(p.name, p.d_model, p.downscale // vae_downscale) for p in points),
            channels=config.in_channels,
            stride=2 ** (len(config.block_out_channels) - 1),
            tokens=tokens,
            text_dim=config.cross_attention_dim,
            pooled_dim=config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,
        )

    def grids(self, sample: Tensor) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each hook point for latents [B, C, h, w]."""
        height, width = sample.shape[-2:]
        return {point.name: (height // point.stride, width // point.stride) for point in self.points}

    def input_names(self) -> tuple[str, ...]:
        """Of the graph, in order."""
        gains = (f"gain.{point.name}" for point in self.points)
        biases = (f"bias.{point.name}" for point in self.points)
        return ("sample", "timestep", "text", "pooled", "time_ids", *gains, *biases)

    def output_names(self) -> tuple[str, ...]:
        """Of the graph, in order."""
        return (PREDICTION, *(update_name(point.name) for point in self.points))

    def steering_inputs(self, steering: Mapping[str, Affine], sample: Tensor) -> dict[str, Tensor]:
        """Gains and then biases of every point for latents [B, C, h, w]; 1 and 0 where a point is not steered."""
        gains, biases = {}, {}
        for point in self.points:
            if (pair := steering.get(point.name)) is None:
                batch, grid = len(sample), self.grids(sample)[point.name]
                gain = torch.ones(batch, 1, *grid, device=sample.device)
                pair = gain, torch.zeros(batch, point.d_model, *grid, device=sample.device)
            gains[f"gain.{point.name}"], biases[f"bias.{point.name}"] = pair
        return gains | biases

    def input_shape(self, name: str, batch: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of an input for a batch of latents of height x width cells."""
        kind, _, point_name = name.partition(".")
        fixed = {
            "sample": (self.channels, height, width),
            "timestep": (),
            "text": (self.tokens, self.text_dim),
            "pooled": (self.pooled_dim,),
            "time_ids": (6,),
        }
        if kind in fixed:
            return batch, *fixed[kind]
        point = next(point for point in self.points if point.name == point_name)
        return batch, 1 if kind == "gain" else point.d_model, height // point.stride, width // point.stride

    @staticmethod
    def input_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
        """Type of an input of a graph in `dtype`: the time and the steering stay in float32."""
        return torch.float32 if name.startswith(("timestep", "gain.", "bias.")) else dtype

    def output_shape(self, name: str, sample: Tensor) -> tuple[int, ...]:
        """Shape of an output for latents [B, C, h, w]."""
        if name == PREDICTION:
            return tuple(sample.shape)
        point = next(point for point in self.points if update_name(point.name) == name)
        rows, columns = self.grids(sample)[point.name]
        return len(sample), rows * columns, point.d_model


class SteerableUNet(nn.Module):
    """The tapped walk with `gain * update + bias` at every hook point, in float32 like the steering algebra."""

    def __init__(self, unet: UNet2DConditionModel, spec: GraphSpec) -> None:
        super().__init__()
        self.unet = unet
        self._points = tuple(point.name for point in spec.points)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        gains: tuple[Tensor, ...] = (),
        biases: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """One pass.

        Args:
            sample: scaled latents [B, C, h, w].
            timestep: [B] float32.
            text: [B, tokens, text_dim].
            pooled: [B, pooled_dim].
            time_ids: [B, 6].
            gains: by hook point, [B, 1, rows, columns] float32 each.
            biases: by hook point, [B, d_model, rows, columns] float32 each.

        Returns:
            The prediction [B, C, h, w], then the update of each hook point before its steering, [B, P, d_model].
        """
        steering = dict(zip(self._points, zip(gains, biases, strict=True), strict=True))
        updates: dict[str, Tensor] = {}

        def steer(point: str, update: Tensor, _: tuple[int, int]) -> Tensor:
            updates[point] = update
            gain, bias = steering[point]
            return (to_tokens(gain) * update.float() + to_tokens(bias)).to(update.dtype)

        # The walk joins the pooled text to embeddings made in float32; TensorRT wants both of one type in the graph.
        conditions = Conditions(text, pooled.float(), time_ids)
        prediction = tapped_forward(self.unet, sample, timestep, conditions, tap=steer, at=frozenset(self._points))
        if prediction is None:
            raise AssertionError("a pass that is not stopped predicts")
        return prediction, *(updates[point] for point in self._points)


Execute = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]
"""(every input by name; the outputs wanted by name, to be written into): one pass of a compiled graph.

All tensors are contiguous and on the backend's device, with the shapes that a :class:`GraphSpec` tells."""


class GraphUNet:
    """A U-Net that was compiled ahead of time from the graph, by whatever `execute` calls."""

    takes_bias = False

    def __init__(self, name: str, spec: GraphSpec, execute: Execute) -> None:
        self.name = name
        self._spec = spec
        self._execute = execute

    def predict(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> Tensor:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        return self._passes(sample, timestep, conditions, tap, [PREDICTION])[PREDICTION]

    def read(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> None:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        self._passes(sample, timestep, conditions, tap, [])

    def _passes(
        self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap, wanted: Sequence[str]
    ) -> dict[str, Tensor]:
        timesteps = timestep.float().expand(len(sample))
        values = (sample, timesteps, *conditions.tensors())
        fixed = dict(zip(self._spec.input_names(), values, strict=False))

        def run(steering: Mapping[str, Affine], wanted: Sequence[str]) -> dict[str, Tensor]:
            inputs = fixed | self._spec.steering_inputs(steering, sample)
            outputs = {name: sample.new_empty(self._spec.output_shape(name, sample)) for name in wanted}
            self._execute({name: tensor.contiguous() for name, tensor in inputs.items()}, outputs)
            return outputs

        return steered_passes(run, self._spec.grids(sample), tap, wanted)
