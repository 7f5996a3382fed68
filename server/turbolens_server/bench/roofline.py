"""What a pass of a network must cost at least: its matrix work, at a device's measured speed.

The floor of a pass is the sum over its matrix products and convolutions of the longer of two times: the arithmetic at
the device's peak, and reading the weights once from its memory. All else (activations, norms, attention's own
traffic, launches) is free in it, so no implementation in this arithmetic is faster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from turbolens_server.bench.device import Speed

_WEIGHT_AT: Final = {torch.ops.aten.addmm: 2, torch.ops.aten.mm: 1, torch.ops.aten.convolution: 1}
"""Which argument of an operation holds a layer's weights; the products of attention have none."""


@dataclasses.dataclass(frozen=True)
class MatrixOp:
    """One matrix product, convolution or product of attention."""

    flops: int
    """Multiplications and additions."""
    weights: int
    """Parameters that it reads."""


class _Recorder(TorchDispatchMode):
    """Notes the matrix operations of what runs under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.ops: list[MatrixOp] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = func.overloadpacket
        if kind in flop_registry:
            flops = flop_registry[kind](*args, **(kwargs or {}), out_val=out)
            weights = args[_WEIGHT_AT[kind]].numel() if kind in _WEIGHT_AT else 0
            self.ops.append(MatrixOp(int(flops), weights))
        return out


def unet_ops(unet: Any, batch: int, height: int, width: int) -> list[MatrixOp]:
    """Matrix operations of one pass of an SDXL-type U-Net on latents [batch, C, height, width]; nothing is computed."""
    twin = _on_meta(unet)
    config = twin.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return _record(
        lambda: twin(
            _empty(batch, config.in_channels, height, width),
            _empty(batch),
            _empty(batch, 77, config.cross_attention_dim),
            added_cond_kwargs={"text_embeds": _empty(batch, pooled), "time_ids": _empty(batch, 6)},
            return_dict=False,
        )
    )


def vae_ops(vae: Any, batch: int, height: int, width: int) -> list[MatrixOp]:
    """Matrix operations of decoding latents [batch, C, height, width]."""
    twin = _on_meta(vae)
    return _record(lambda: twin.decode(_empty(batch, twin.config.latent_channels, height, width), return_dict=False))


def sae_ops(positions: int, d_model: int, d_sae: int) -> list[MatrixOp]:
    """Matrix operations of encoding updates [positions, d_model]; choosing the k largest is no arithmetic."""
    return [MatrixOp(2 * positions * d_model * d_sae, d_model * d_sae)]


def total_flops(ops: Iterable[MatrixOp]) -> int:
    """Multiplications and additions of all operations."""
    return sum(op.flops for op in ops)


def floor_ms(ops: Iterable[MatrixOp], speed: Speed, dtype: torch.dtype) -> float:
    """Milliseconds that the operations take at least on a device, with weights in `dtype`."""
    seconds = (max(op.flops / speed.tflops / 1e12, op.weights * dtype.itemsize / speed.gb_s / 1e9) for op in ops)
    return 1000 * sum(seconds)


def _on_meta(module: Any) -> Any:
    """The same architecture without weights."""
    with init_empty_weights():
        return type(module).from_config(module.config)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _record(run: Callable[[], object]) -> list[MatrixOp]:
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        run()
    return recorder.ops
