"""The Triton kernels. What each computes is in :mod:`turbolens_server.kernels.fused`, which launches them.

A selected activation travels as one int64 key: the bits of its positive part above, MAX_ID less its feature below.
Keys are distinct, and their order is the rule of selection: larger value first, then smaller feature. A negative
pre-activation has the bits of 0, a NaN those of a number beyond infinity; -1 is no candidate at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_ID = tl.constexpr(0x7FFFFFFF)
NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit
def _value_bits(pre):
    """Bits of the positive part of float32 pre-activations: as int32 they are in order of value."""
    bits = tl.where(pre > 0, pre.to(tl.int32, bitcast=True), 0)
    return tl.where(pre != pre, NAN_BITS, bits)


@triton.jit
def _key(bits, feature):
    return (bits.to(tl.int64) << 32) | (feature.to(tl.int64) ^ MAX_ID)


@triton.jit
def _pre_activations(
    x_ptr,
    w_ptr,
    bias_ptr,
    rows,
    rows_ok,
    columns,
    columns_ok,
    w_stride_d,
    w_stride_f,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of x W_enc + bias, accumulated in float32: [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        x_ok = rows_ok[:, None] if D % BLOCK_K == 0 else rows_ok[:, None] & (depth < D)[None, :]
        w_ok = columns_ok[None, :] if D % BLOCK_K == 0 else columns_ok[None, :] & (depth < D)[:, None]
        x = tl.load(x_ptr + rows[:, None] * D + depth[None, :], mask=x_ok, other=0.0)
        w = tl.load(w_ptr + depth[:, None] * w_stride_d + columns[None, :] * w_stride_f, mask=w_ok, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc + tl.load(bias_ptr + columns, mask=columns_ok, other=0.0).to(tl.float32)[None, :]


@triton.jit
def shortlist(
    x_ptr,
    w_ptr,
    bias_ptr,
    flags_ptr,
    keys_ptr,
    N,
    w_stride_d,
    w_stride_f,
    D: tl.constexpr,
    F: tl.constexpr,
    PER_TILE: tl.constexpr,
    ONLY_FLAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The best PER_TILE candidates of BLOCK_M rows among the BLOCK_N features of one tile, best first.

    Rounds of arg-max over the accumulators while they are still in registers: for a few candidates that is some nine
    instructions an element, where sorting the tile is some sixty.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = rows < N
    if ONLY_FLAGGED:
        if tl.max(tl.load(flags_ptr + rows, mask=rows_ok, other=0), axis=0) == 0:
            return
    tile = tl.program_id(1)
    lane = tl.arange(0, BLOCK_N)
    columns = tile * BLOCK_N + lane
    pre = _pre_activations(
        x_ptr, w_ptr, bias_ptr, rows, rows_ok, columns, columns < F, w_stride_d, w_stride_f, D, BLOCK_K
    )
    bits = tl.where((columns < F)[None, :], _value_bits(pre), -1)
    tiles: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    for slot in range(PER_TILE):
        # The leftmost of equals is the smallest feature.
        best, at = tl.max(bits, axis=1, return_indices=True, return_indices_tie_break_left=True)
        key = tl.where(best >= 0, _key(best, tile * BLOCK_N + at), -1)
        tl.store(keys_ptr + (rows * tiles + tile) * PER_TILE + slot, key, mask=rows_ok)
        bits = tl.where(lane[None, :] == at[:, None], -1, bits)


@triton.jit
def above_threshold(
    x_ptr,
    w_ptr,
    bias_ptr,
    threshold_ptr,
    counts_ptr,
    keys_ptr,
    N,
    w_stride_d,
    w_stride_f,
    D: tl.constexpr,
    F: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Keys of what lies above each feature's threshold, packed into each row's SLOTS in order of arrival.

    counts goes on counting where the slots are full.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = rows < N
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_ok = columns < F
    pre = _pre_activations(
        x_ptr, w_ptr, bias_ptr, rows, rows_ok, columns, columns_ok, w_stride_d, w_stride_f, D, BLOCK_K
    )
    threshold = tl.load(threshold_ptr + columns, mask=columns_ok, other=0.0).to(tl.float32)
    active = ((pre > threshold[None, :]) & (pre > 0)) | (pre != pre)
    active = (active & rows_ok[:, None] & columns_ok[None, :]).to(tl.int32)
    number = tl.sum(active, axis=1)
    first = tl.atomic_add(counts_ptr + rows, number, mask=rows_ok & (number > 0), sem="relaxed")
    slot = first[:, None] + tl.cumsum(active, axis=1) - active
    key = _key(_value_bits(pre), tl.broadcast_to(columns[None, :], (BLOCK_M, BLOCK_N)))
    tl.store(keys_ptr + rows[:, None] * SLOTS + slot, key, mask=(active > 0) & (slot < SLOTS))


@triton.jit
def merge(
    keys_ptr,
    counts_ptr,
    flags_ptr,
    values_ptr,
    indices_ptr,
    N,
    KEYS: tl.constexpr,
    PER_TILE: tl.constexpr,
    K: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    ONLY_FLAGGED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The K best of each row's KEYS candidates, best first, and the certificate that no tile kept a better one back.

    A tile that gave PER_TILE candidates kept back only keys below the last of them. So if no tile's last one is above
    the K-th chosen key, nothing was missed; otherwise the row is flagged.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_ok = rows < N
    if ONLY_FLAGGED:
        rows_ok = rows_ok & (tl.load(flags_ptr + rows, mask=rows_ok, other=0) > 0)
        if tl.max(rows_ok.to(tl.int32), axis=0) == 0:
            return
    slot = tl.arange(0, WIDTH)
    given = rows_ok[:, None] & (slot < KEYS)[None, :]
    if HAS_COUNTS:
        given = given & (slot[None, :] < tl.load(counts_ptr + rows, mask=rows_ok, other=0)[:, None])
    left = tl.load(keys_ptr + rows[:, None] * KEYS + slot[None, :], mask=given, other=-1)
    kth = tl.zeros((BLOCK_R,), tl.int64)
    for at in range(K):
        kth = tl.max(left, axis=1)
        bits = tl.where(kth >= 0, kth >> 32, 0).to(tl.int32)
        index = tl.where(kth >= 0, (kth & MAX_ID) ^ MAX_ID, 0)
        tl.store(values_ptr + rows * K + at, bits.to(tl.float32, bitcast=True), mask=rows_ok)
        tl.store(indices_ptr + rows * K + at, index, mask=rows_ok)
        left = tl.where(left == kth[:, None], -1, left)
    if not HAS_COUNTS:
        if not ONLY_FLAGGED:
            # Read again rather than kept in registers all the way.
            last = given & (slot % PER_TILE == PER_TILE - 1)[None, :]
            keys = tl.load(keys_ptr + rows[:, None] * KEYS + slot[None, :], mask=last, other=-1)
            # A tile whose last candidate is 0 keeps back zeros only, and those are all alike.
            hides = ((keys > kth[:, None]) & ((keys >> 32) > 0)).to(tl.int32)
            tl.store(flags_ptr + rows, tl.max(hides, axis=1), mask=rows_ok)


@triton.jit
def decode_rows(
    values_ptr,
    indices_ptr,
    w_ptr,
    out_ptr,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row's share of BLOCK_D dimensions: the sum of K decoder rows by activation."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(K):
        feature = tl.load(indices_ptr + row * K + at)
        value = tl.load(values_ptr + row * K + at)
        acc += value * tl.load(w_ptr + feature * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + dims, acc, mask=dims < D)


@triton.jit
def edit_updates(
    x_ptr,
    gain_ptr,
    offsets_ptr,
    features_ptr,
    slope_ptr,
    shift_ptr,
    w_ptr,
    values_ptr,
    indices_ptr,
    out_ptr,
    P,
    D: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of positions and dimensions of one picture: read once, every edit of the picture applied, written once."""
    row = tl.program_id(0).to(tl.int64)
    positions = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = row * P + positions  # of [B * P]
    inside = positions < P
    tile_ok = inside[:, None] & (dims < D)[None, :]
    place = at[:, None] * D + dims[None, :]
    x = tl.load(x_ptr + place, mask=tile_ok, other=0.0).to(tl.float32)
    acc = x * tl.load(gain_ptr + at, mask=inside, other=0.0)[:, None]
    if K > 0:
        slot = tl.arange(0, WIDTH)
        coded = inside[:, None] & (slot < K)[None, :]
        codes = at[:, None] * K + slot[None, :]
        values = tl.load(values_ptr + codes, mask=coded, other=0.0)
        indices = tl.load(indices_ptr + codes, mask=coded, other=-1)
    for entry in range(tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)):
        feature = tl.load(features_ptr + entry)
        own = entry * P + positions
        amount = tl.load(shift_ptr + own, mask=inside, other=0.0)
        if K > 0:
            z = tl.sum(tl.where(indices == feature, values, 0.0), axis=1)
            amount += tl.load(slope_ptr + own, mask=inside, other=0.0) * z
        direction = tl.load(w_ptr + feature * D + dims, mask=dims < D, other=0.0).to(tl.float32)
        acc += amount[:, None] * direction[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=tile_ok)
