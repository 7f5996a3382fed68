"""The U-Net as one closed graph: gains and biases in, prediction and updates out. What compilers and exporters see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from turbolens_server.unet.backend import PREDICTION, Affine, Tap, steered_passes, to_tokens
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.spec import GraphSpec
from turbolens_server.unet.tapped import OwnModules, attention_blocks, tapped_forward


class SteerableUNet(nn.Module):
    """The tapped walk with `gain * update + bias` at every hook point, in float32 like the steering algebra."""

    def __init__(self, unet: UNet2DConditionModel, spec: GraphSpec) -> None:
        super().__init__()
        self.unet = unet
        self._points = tuple(point.name for point in spec.points)
        self._hearing = spec.hearing
        self._strides = {name: 2**halvings for name, halvings, _ in attention_blocks(unet)}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        hearing: tuple[Tensor, ...] = (),
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
            hearing: by grid, what is added to the logits of cross-attention, [B, rows, columns, tokens] each.
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
        added = {stride: grid.flatten(1, 2) for stride, grid in zip(self._hearing, hearing, strict=True)}
        blocks = OwnModules({name: added[stride] for name, stride in self._strides.items()} if added else None)
        at = frozenset(self._points)
        prediction = tapped_forward(self.unet, sample, timestep, conditions, tap=steer, at=at, blocks=blocks)
        if prediction is None:
            raise AssertionError("a pass that is not stopped predicts")
        return prediction, *(updates[point] for point in self._points)


Execute = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]
"""(every input by name; the outputs wanted by name, to be written into): one pass of a compiled graph.

All tensors are contiguous and on the backend's device, with the shapes that a :class:`GraphSpec` tells."""


class GraphUNet:
    """A U-Net that was compiled ahead of time from the graph, by whatever `execute` calls."""

    def __init__(self, name: str, spec: GraphSpec, execute: Execute, hearing: GraphUNet | None = None) -> None:
        """`hearing` runs what has a bias; None: where this graph does not, none is taken."""
        self.name = name
        self.takes_bias = bool(spec.hearing) or hearing is not None
        self._spec = spec
        self._execute = execute
        self._hearing = hearing

    def predict(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> Tensor:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        return self._passes(sample, timestep, conditions, tap, [PREDICTION])[PREDICTION]

    def read(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> None:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        self._passes(sample, timestep, conditions, tap, [])

    def _passes(
        self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap, wanted: Sequence[str]
    ) -> dict[str, Tensor]:
        if conditions.bias and self._hearing is not None:
            return self._hearing._passes(sample, timestep, conditions, tap, wanted)
        timesteps = timestep.float().expand(len(sample))
        values = (sample, timesteps, *conditions.tensors())
        fixed = dict(zip(self._spec.input_names(), values, strict=False))
        fixed |= self._spec.hearing_inputs(conditions, sample)

        def run(steering: Mapping[str, Affine], wanted: Sequence[str]) -> dict[str, Tensor]:
            inputs = fixed | self._spec.steering_inputs(steering, sample)
            outputs = {name: sample.new_empty(self._spec.output_shape(name, sample)) for name in wanted}
            self._execute({name: tensor.contiguous() for name, tensor in inputs.items()}, outputs)
            return outputs

        return steered_passes(run, self._spec.grids(sample), tap, wanted)
