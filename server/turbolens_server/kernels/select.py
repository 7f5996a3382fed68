"""The largest pre-activations of each row on a CPU: what :func:`turbolens_server.kernels.twin.select_topk` says.

A positive float grows as its bits do. So a value and its feature together are one whole number, of which there are no
two alike, and NumPy, which partitions such numbers several at once, needs less than half the time of `torch.topk`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_AT_ONCE: Final = 2**17
"""Numbers that a thread works on: with their keys they stay in its cache."""
_HELPERS: Final = ThreadPoolExecutor(8, thread_name_prefix="select")
"""NumPy lets other threads run; a pool for the process, since its threads hold nothing."""

Selected = tuple[Tensor, Tensor]
"""Values [N, k] float32, falling and >= 0, and their features [N, k] int64."""


def select_topk(pre: Sequence[Tensor], k: int) -> list[Selected]:
    """Select in several matrices at once.

    Args:
        pre: pre-activations, each [N, d_sae] float32 on the CPU, of one width. What is not positive counts as 0.
        k: how many to keep, 1 to d_sae: NaN first, the larger value, among equal ones the smaller feature.
    """
    width = pre[0].shape[1]
    values: npt.NDArray[np.float32] = np.empty((sum(map(len, pre)), k), np.float32)
    indices: npt.NDArray[np.int64] = np.empty(values.shape, np.int64)
    ends = list(itertools.accumulate(map(len, pre), initial=0))
    rows = max(1, _AT_ONCE // width)
    pieces = [
        (matrix.numpy()[at : at + rows], slice(start + at, start + min(at + rows, len(matrix))))
        for matrix, start in zip(pre, ends, strict=False)
        for at in range(0, len(matrix), rows)
    ]

    def work(own: Sequence[tuple[npt.NDArray[np.float32], slice]]) -> None:
        for piece, where in own:
            _select(piece, values[where], indices[where])

    threads = min(torch.get_num_threads(), values.shape[0] * width // _AT_ONCE)
    if threads > 1:
        list(_HELPERS.map(work, (pieces[one::threads] for one in range(threads))))
    else:
        work(pieces)
    return [
        (torch.from_numpy(values[start:end]), torch.from_numpy(indices[start:end]))
        for start, end in itertools.pairwise(ends)
    ]


def _select(pre: npt.NDArray[np.float32], values: npt.NDArray[np.float32], indices: npt.NDArray[np.int64]) -> None:
    """Of some rows, into what is given for them."""
    rows, width = pre.shape
    k = values.shape[1]
    keys = np.empty((rows, width), "<u8")
    # The upper half is the value, the lower one the feature, the smaller as the larger number. `abs`: -0 is not large.
    np.abs(np.maximum(pre, 0), out=keys.view("<f4").reshape(rows, width, 2)[..., 1])
    keys.view("<u4").reshape(rows, width, 2)[..., 0] = ~np.arange(width, dtype=np.uint32)
    keys.partition(width - k, axis=1)
    best = keys[:, width - k :]
    best.sort(axis=1)
    best = np.ascontiguousarray(best[:, ::-1])
    values[:] = best.view("<f4").reshape(rows, k, 2)[..., 1]
    indices[:] = ~best.view("<u4").reshape(rows, k, 2)[..., 0]
