"""Which of two samples is larger: effect sizes, tests, and their correction for many."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def separate(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Cliff's delta and the two-sided p of a Mann-Whitney test, of every column.

    Args:
        a: [n, columns].
        b: [m, columns].

    Returns:
        [columns] each.
    """
    n, m = len(a), len(b)
    both = np.concatenate([a, b])
    effects, p = np.zeros(both.shape[1]), np.ones(both.shape[1])
    for column, values in enumerate(both.T):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # those of ties are shared
        wins = ranks[:n].sum() - n * (n + 1) / 2
        effects[column] = 2 * wins / (n * m) - 1
        ties = float((counts.astype(float) ** 3 - counts).sum()) / ((n + m) * (n + m - 1))
        spread = math.sqrt(max(n * m / 12 * (n + m + 1 - ties), 0.0))
        if spread > 0:
            far = max(abs(wins - n * m / 2) - 0.5, 0.0) / spread
            p[column] = math.erfc(far / math.sqrt(2))
    return effects, p


def false_discovery(p: Floats) -> Floats:
    """Each p corrected for all of them: the least rate of false discoveries at which it counts."""
    order = np.argsort(p)[::-1]
    scaled = p[order] * len(p) / np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum.accumulate(scaled) if len(p) else scaled
    return np.minimum(corrected, 1.0)
