"""The shapes of what goes into a graph of the U-Net and comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from turbolens_server.unet.backend import PREDICTION, Affine, update_name
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.points import HookPoint


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
    hearing: tuple[int, ...] = ()
    """Latent cells per cell, each way, of the grids on which the graph takes a bias on cross-attention, rising; its
    texts are then of any number of tokens. Empty: it takes no bias, and texts of `tokens` alone."""

    @classmethod
    def of(cls, config: Mapping[str, Any], points: Sequence[HookPoint], vae_downscale: int, tokens: int) -> GraphSpec:
        """The spec of a U-Net of this configuration with these hook points (in order of execution) and texts of
        `tokens` tokens."""
        return cls(
            points=tuple(GraphPoint(p.name, p.d_model, p.downscale // vae_downscale) for p in points),
            channels=config["in_channels"],
            stride=2 ** (len(config["block_out_channels"]) - 1),
            tokens=tokens,
            text_dim=config["cross_attention_dim"],
            pooled_dim=config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"],
        )

    def grids(self, sample: Tensor) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each hook point for latents [B, C, h, w]."""
        height, width = sample.shape[-2:]
        return {point.name: (height // point.stride, width // point.stride) for point in self.points}

    def input_names(self) -> tuple[str, ...]:
        """Of the graph, in order."""
        gains = (f"gain.{point.name}" for point in self.points)
        biases = (f"bias.{point.name}" for point in self.points)
        hearing = (f"hearing.{stride}" for stride in self.hearing)
        return ("sample", "timestep", "text", "pooled", "time_ids", *hearing, *gains, *biases)

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

    def hearing_inputs(self, conditions: Conditions, sample: Tensor) -> dict[str, Tensor]:
        """What is added to the logits on every grid for latents [B, C, h, w]: [B, rows, columns, tokens]."""
        grids = {stride: (sample.shape[2] // stride, sample.shape[3] // stride) for stride in self.hearing}
        return {f"hearing.{stride}": conditions.bias[grid].unflatten(1, grid) for stride, grid in grids.items()}

    def input_shape(self, name: str, batch: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of an input for a batch of latents of height x width cells."""
        kind, _, which = name.partition(".")
        fixed = {
            "sample": (self.channels, height, width),
            "timestep": (),
            "text": (self.tokens, self.text_dim),
            "pooled": (self.pooled_dim,),
            "time_ids": (6,),
        }
        if kind in fixed:
            return batch, *fixed[kind]
        if kind == "hearing":
            return batch, height // int(which), width // int(which), self.tokens
        point = next(point for point in self.points if point.name == which)
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
