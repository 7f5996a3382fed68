"""The SAE kernels as PyTorch operators (namespace `turbolens`): known to autograd, `torch.compile` and export.

On a CPU each runs in plain torch, on a GPU what :mod:`turbolens_server.kernels.choice` says; the slow twin of each is
in :mod:`turbolens_server.kernels.twin`. The functions check their arguments and call the operator of their name.

A NaN pre-activation counts as larger than any number and stays a NaN, so that it is seen and never hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turbolens_server.kernels import plain
from turbolens_server.kernels.choice import Kernel, implementation


class TopK(NamedTuple):
    """The k largest activations of each row, falling; among equal ones the smaller feature first."""

    values: Tensor  # [N, k] float32, >= 0
    indices: Tensor  # [N, k] int64, distinct in a row; which ones is open where the value is 0
    flagged: Tensor  # [N] int32: 1 where the fused kernel could not be sure at first, and did the row again


class JumpRelu(NamedTuple):
    """Activations above their thresholds, falling, padded with zeros."""

    values: Tensor  # [N, max_l0] float32, >= 0
    indices: Tensor  # [N, max_l0] int64; open where the value is 0
    counts: Tensor  # [N] int32: active features; where it is above max_l0 some are missing: encode again with more


def encode_topk(x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> TopK:
    """Encode updates, keep the k largest pre-activations and then their positive part. Differentiable.

    Args:
        x: updates [N, d_model].
        W_enc: [d_model, d_sae].
        bias: [d_sae], with b_dec folded in.
        k: activations to keep, 1 to d_sae.

    Raises:
        ValueError: shapes that do not fit, or k out of range.
    """
    _check_encoder(x, W_enc, bias)
    _check_range("k", k, W_enc.shape[1])
    return TopK(*_encode_topk(x, W_enc, bias, k))


def encode_jumprelu(x: Tensor, W_enc: Tensor, bias: Tensor, threshold: Tensor, max_l0: int) -> JumpRelu:
    """Encode updates and keep what is positive and strictly above each feature's threshold.

    Args:
        x: updates [N, d_model].
        W_enc: [d_model, d_sae].
        bias: [d_sae], with b_dec folded in.
        threshold: [d_sae].
        max_l0: slots of each row, 1 to d_sae.

    Raises:
        ValueError: shapes that do not fit, or max_l0 out of range.
    """
    _check_encoder(x, W_enc, bias)
    _check_range("max_l0", max_l0, W_enc.shape[1])
    if threshold.shape != bias.shape:
        raise ValueError(f"threshold: [{len(bias)}] like bias, not {tuple(threshold.shape)}")
    return JumpRelu(*_encode_jumprelu(x, W_enc, bias, threshold, max_l0))


def gather_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of decoder rows by activation, without b_dec. Differentiable.

    Args:
        values: [N, K] float32.
        indices: [N, K] int64, in 0 to d_sae - 1.
        W_dec: [d_sae, d_model].

    Returns:
        [N, d_model] float32.

    Raises:
        ValueError: shapes that do not fit.
    """
    if values.shape != indices.shape or values.dim() != 2:
        raise ValueError(f"values and indices: both [N, K], not {tuple(values.shape)} and {tuple(indices.shape)}")
    decoded: Tensor = _gather_decode(values, indices, W_dec)
    return decoded


def apply_edits(
    x: Tensor,
    gain: Tensor,
    offsets: Tensor,
    features: Tensor,
    slope: Tensor,
    shift: Tensor,
    W_dec: Tensor,
    values: Tensor,
    indices: Tensor,
) -> Tensor:
    """Apply all edits of a batch to its updates at one hook point, which `steering.compose` packs.

    Args:
        x: updates [B, P, d_model].
        gain: what is left of the update [B, P] float32.
        offsets: [B + 1] int32; the entries of row b are offsets[b] to offsets[b + 1].
        features: [E] int64, the feature of each entry.
        slope: [E, P] float32, how much of the feature's activation comes on top of it.
        shift: [E, P] float32, how much of the feature comes on top whatever its activation.
        W_dec: [d_sae, d_model].
        values: activations of x [B, P, K] float32; K = 0 where no entry has a slope.
        indices: their features [B, P, K] int64.

    Returns:
        gain x + sum over a row's entries of (slope z + shift) d_j, [B, P, d_model], in x's type.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, positions, d_model = x.shape
    entries = len(features)
    wanted = {
        "gain": (gain, (rows, positions)), "offsets": (offsets, (rows + 1,)), "slope": (slope, (entries, positions)),
        "shift": (shift, (entries, positions)), "W_dec": (W_dec, (W_dec.shape[0], d_model)),
        "values": (values, (rows, positions, values.shape[-1])), "indices": (indices, tuple(values.shape)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: {list(shape)}, not {list(tensor.shape)}")
    steered: Tensor = _apply_edits(x, gain, offsets, features, slope, shift, W_dec, values, indices)
    return steered


def _check_encoder(x: Tensor, W_enc: Tensor, bias: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] != W_enc.shape[0]:
        raise ValueError(f"x: [N, {W_enc.shape[0]}], not {list(x.shape)}")
    if bias.shape != W_enc.shape[1:]:
        raise ValueError(f"bias: [{W_enc.shape[1]}], not {list(bias.shape)}")


def _check_range(name: str, number: int, d_sae: int) -> None:
    if not 1 <= number <= d_sae:
        raise ValueError(f"{name}: 1 to {d_sae}, not {number}")


def _served(kernel: Kernel) -> Callable[..., Any]:
    """What runs on a GPU, looked up at each call, so that Triton is imported only where it serves."""

    def run(*args: Any) -> Any:
        return getattr(implementation(kernel), kernel)(*args)

    return run


_encode_topk = torch.library.custom_op("turbolens::encode_topk", plain.encode_topk, mutates_args=(), device_types="cpu")
_encode_jumprelu = torch.library.custom_op(
    "turbolens::encode_jumprelu", plain.encode_jumprelu, mutates_args=(), device_types="cpu"
)
_gather_decode = torch.library.custom_op(
    "turbolens::gather_decode", plain.gather_decode, mutates_args=(), device_types="cpu"
)
_apply_edits = torch.library.custom_op("turbolens::apply_edits", plain.apply_edits, mutates_args=(), device_types="cpu")
_encode_topk.register_kernel("cuda")(_served("encode_topk"))
_encode_jumprelu.register_kernel("cuda")(_served("encode_jumprelu"))
_gather_decode.register_kernel("cuda")(_served("gather_decode"))
_apply_edits.register_kernel("cuda")(_served("apply_edits"))


def _sparse(x: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices and a number of each row, for shapes only."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.shape[0]
    return (
        x.new_empty(rows, width, dtype=dtype),
        x.new_empty(rows, width, dtype=torch.int64),
        x.new_empty(rows, dtype=torch.int32),
    )


@_encode_topk.register_fake
def _(x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return _sparse(x, k)


@_encode_jumprelu.register_fake
def _(x: Tensor, W_enc: Tensor, bias: Tensor, threshold: Tensor, max_l0: int) -> tuple[Tensor, Tensor, Tensor]:
    return _sparse(x, max_l0)


@_gather_decode.register_fake
def _(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return values.new_empty(values.shape[0], W_dec.shape[1])


@_apply_edits.register_fake
def _(x: Tensor, *edits: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W_enc, bias, _ = inputs
    values, indices, flagged = output
    ctx.mark_non_differentiable(indices, flagged)
    ctx.save_for_backward(x, W_enc, bias, values, indices)


def _backward_topk(
    ctx: Any, grad: Tensor, _indices: None, _flagged: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """Only what was selected and positive has a gradient (Gao et al. 2024): no [N, d_sae] is ever made."""
    x, W_enc, bias, values, indices = ctx.saved_tensors
    grad = torch.where(values > 0, grad, 0)  # [N, k]
    grad_x = grad_W = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_x = gather_decode(grad, indices, W_enc.T.contiguous()).to(x.dtype)
    if ctx.needs_input_grad[1]:
        grad_W = _sum_of_rows(grad, indices, x, W_enc.shape[1]).T.to(W_enc.dtype)
    if ctx.needs_input_grad[2]:
        grad_b = grad.new_zeros(len(bias)).index_add_(0, indices.flatten(), grad.flatten()).to(bias.dtype)
    return grad_x, grad_W, grad_b, None


def _save_decode(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_decode(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    """Gradients of the selected activations and decoder rows only."""
    values, indices, W_dec = ctx.saved_tensors
    grad_values = grad_W = None
    if ctx.needs_input_grad[0]:
        dots = [(W_dec[indices[:, slot]] * grad).sum(1) for slot in range(values.shape[1])]
        grad_values = torch.stack(dots, dim=1).to(values.dtype)
    if ctx.needs_input_grad[2]:
        grad_W = _sum_of_rows(values, indices, grad, len(W_dec)).to(W_dec.dtype)
    return grad_values, None, grad_W


def _sum_of_rows(weights: Tensor, targets: Tensor, rows: Tensor, count: int) -> Tensor:
    """out[targets[n, s]] += weights[n, s] rows[n], over all n and s: [N, k], [N, k], [N, d] -> [count, d].

    Slot by slot, so that no more than one [N, d] is held beside the sum. On a GPU the order of the sums is open.
    """
    out = weights.new_zeros(count, rows.shape[1])
    for slot in range(weights.shape[1]):
        out.index_add_(0, targets[:, slot], weights[:, slot, None] * rows)
    return out


_encode_topk.register_autograd(_backward_topk, setup_context=_save_topk)
_gather_decode.register_autograd(_backward_decode, setup_context=_save_decode)
