"""The fused kernels: launches of :mod:`turbolens_server.kernels.triton_kernels`, on CUDA tensors.

Every function has the arguments and results of its namesake in :mod:`turbolens_server.kernels.plain`, and `tiles`, by
which a benchmark may choose among launches. Nothing here makes the host wait, so all of it can be captured in a CUDA
graph. On CPU tensors they run only in Triton's interpreter, which is for tests.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import torch
import triton
from torch import Tensor

from turbolens_server.kernels import triton_kernels as kernels


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How an encoder's matrix product is cut up."""

    block_m: int = 64
    """Rows a program works on."""
    block_n: int = 128
    """Features a program works on: one tile."""
    block_k: int = 64
    """Dimensions of the update taken at a time."""
    num_warps: int = 8
    num_stages: int = 3
    candidates: int | None = None
    """Candidates a tile gives in `encode_topk`, enough for k of all tiles; by default what `candidates_for` says."""
    merge_rows: int = 4
    """Rows a program of the merge works on."""


TOPK_TILES: Final = Tiles(block_m=128)
"""Of `encode_topk`: the fastest on an H100 from one picture to sixteen, by docs/performance.md."""
OTHER_TILES: Final = (Tiles(), Tiles(block_n=64, num_warps=4), Tiles(block_m=128, block_n=64, num_warps=4))
"""What the benchmark tries beside them."""
JUMPRELU_TILES: Final = Tiles()
"""Of `encode_jumprelu`: larger ones would not leave registers for the packing."""

FLAGGED_SHARE: Final = 1e-3
"""How many rows may have to be done again, where the features that fire fall into tiles at random."""

FUSE: Final = {"enable_fp_fusion": True}
"""Multiply-adds are fused, as in cuBLAS; Triton wants it said."""


def candidates_for(d_sae: int, k: int, block_n: int) -> int:
    """The fewest candidates of a tile that leave at most FLAGGED_SHARE of rows in doubt, and make k of all tiles.

    A row is in doubt if some tile has that many of its k features: with T tiles at random, in at most
    T P(Binomial(k, 1 / T) >= candidates) of the rows.
    """
    tiles = triton.cdiv(d_sae, block_n)
    last = d_sae - (tiles - 1) * block_n
    chance = [math.comb(k, n) * (1 / tiles) ** n * (1 - 1 / tiles) ** (k - n) for n in range(k + 1)]
    most = min(k, block_n)
    for candidates in range(1, most):
        enough = (tiles - 1) * min(candidates, block_n) + min(candidates, last) >= k
        if enough and tiles * sum(chance[candidates:]) <= FLAGGED_SHARE:
            return candidates
    return most


def encode_topk(
    x: Tensor, W_enc: Tensor, bias: Tensor, k: int, *, tiles: Tiles = TOPK_TILES
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices [N, k] of the k largest pre-activations, and which rows [N] were done again (1) or not (0).

    Two launches choose: tiles of the product with a shortlist of candidates each, then a merge with a certificate.
    Two more do it again for flagged rows with k candidates a tile, which cannot miss; where there are none, their
    programs end at once. So the result is exact whatever the data, and the host need not know.
    """
    x = x.to(W_enc.dtype).contiguous()
    rows, d_sae = len(x), W_enc.shape[1]
    values = torch.empty(rows, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(rows, k, dtype=torch.int64, device=x.device)
    flagged = torch.zeros(rows, dtype=torch.int32, device=x.device)
    if rows:
        most = min(k, tiles.block_n)
        few = min(most, tiles.candidates or candidates_for(d_sae, k, tiles.block_n))
        _choose(x, W_enc, bias, values, indices, flagged, tiles, few, only_flagged=False)
        if few < most:
            _choose(x, W_enc, bias, values, indices, flagged, tiles, most, only_flagged=True)
    return values, indices, flagged


def _choose(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    values: Tensor,
    indices: Tensor,
    flagged: Tensor,
    tiles: Tiles,
    per_tile: int,
    *,
    only_flagged: bool,
) -> None:
    """Write values and indices of all rows, and which are in doubt; or of those in doubt."""
    rows, d_model = x.shape
    d_sae = W_enc.shape[1]
    count = triton.cdiv(d_sae, tiles.block_n)
    keys = torch.empty(rows, count * per_tile, dtype=torch.int64, device=x.device)
    with torch.cuda.device_of(x):
        kernels.shortlist[triton.cdiv(rows, tiles.block_m), count](
            x, W_enc, bias, flagged, keys, rows, *W_enc.stride(),
            D=d_model, F=d_sae, PER_TILE=per_tile, ONLY_FLAGGED=only_flagged,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, **FUSE,
        )  # fmt: skip
        _merge(keys, None, flagged, values, indices, per_tile, only_flagged, tiles.merge_rows)


def _merge(
    keys: Tensor,
    counts: Tensor | None,
    flagged: Tensor | None,
    values: Tensor,
    indices: Tensor,
    per_tile: int,
    only_flagged: bool,
    block_r: int,
) -> None:
    """The best of each row's keys [N, KEYS] into values and indices [N, K]."""
    rows, given = keys.shape
    kernels.merge[(triton.cdiv(rows, block_r),)](
        keys, counts, flagged, values, indices, rows,
        KEYS=given, PER_TILE=per_tile, K=values.shape[1], HAS_COUNTS=counts is not None, ONLY_FLAGGED=only_flagged,
        BLOCK_R=block_r, WIDTH=triton.next_power_of_2(given), num_warps=4, **FUSE,
    )  # fmt: skip


def encode_jumprelu(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    threshold: Tensor,
    max_l0: int,
    *,
    tiles: Tiles = JUMPRELU_TILES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations above threshold, falling: values and indices [N, max_l0]; how many there were, [N].

    Where there were more than max_l0, which of them are given depends on the order of arrival.
    """
    x = x.to(W_enc.dtype).contiguous()
    rows, d_model = x.shape
    d_sae = W_enc.shape[1]
    values = torch.empty(rows, max_l0, dtype=torch.float32, device=x.device)
    indices = torch.empty(rows, max_l0, dtype=torch.int64, device=x.device)
    counts = torch.zeros(rows, dtype=torch.int32, device=x.device)
    if not rows:
        return values, indices, counts
    keys = torch.empty(rows, max_l0, dtype=torch.int64, device=x.device)
    with torch.cuda.device_of(x):
        kernels.above_threshold[triton.cdiv(rows, tiles.block_m), triton.cdiv(d_sae, tiles.block_n)](
            x, W_enc, bias, threshold, counts, keys, rows, *W_enc.stride(),
            D=d_model, F=d_sae, SLOTS=max_l0,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, **FUSE,
        )  # fmt: skip
        _merge(keys, counts, None, values, indices, max_l0, False, tiles.merge_rows)
    return values, indices, counts


def gather_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of decoder rows by activation, without b_dec: [N, K] -> [N, d_model]."""
    rows, width = values.shape
    d_model = W_dec.shape[1]
    out = torch.empty(rows, d_model, dtype=torch.float32, device=values.device)
    if rows:
        block_d = min(256, triton.next_power_of_2(d_model))
        with torch.cuda.device_of(values):
            kernels.decode_rows[rows, triton.cdiv(d_model, block_d)](
                values.contiguous(), indices.contiguous(), W_dec.contiguous(), out,
                D=d_model, K=width, BLOCK_D=block_d, num_warps=2, **FUSE,
            )  # fmt: skip
    return out


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
    """gain x + sum over a row's edited features of (slope z + shift) d_j: [B, P, d_model], in x's type. One launch."""
    x = x.contiguous()
    rows, positions, d_model = x.shape
    width = values.shape[-1]
    out = torch.empty_like(x)
    block_p, block_d = 16, min(128, triton.next_power_of_2(d_model))
    if x.numel():
        with torch.cuda.device_of(x):
            kernels.edit_updates[rows, triton.cdiv(positions, block_p), triton.cdiv(d_model, block_d)](
                x, gain.contiguous(), offsets, features, slope.contiguous(), shift.contiguous(), W_dec.contiguous(),
                values.contiguous(), indices.contiguous(), out, positions,
                D=d_model, K=width, WIDTH=triton.next_power_of_2(max(1, width)),
                BLOCK_P=block_p, BLOCK_D=block_d, num_warps=4, **FUSE,
            )  # fmt: skip
    return out
