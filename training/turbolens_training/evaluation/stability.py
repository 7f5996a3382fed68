"""Whether another seed finds the same features: decoder rows matched one to one, and how well each pair agrees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from turbolens_server.sae.bundle import Bundle, load_bundle


def matched_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the one-to-one matching of rows that makes their sum largest (the Hungarian method).

    Args:
        a: decoder rows [F, d_model].
        b: decoder rows [G, d_model].

    Returns:
        [min(F, G)] float64, in order of the rows of `a` that are matched.
    """
    cosines = functional.normalize(a.double(), dim=1) @ functional.normalize(b.double(), dim=1).T
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    return cosines[rows, columns]


def active_rows(bundle: Bundle) -> Tensor:
    """Decoder rows of the features that the bundle's statistics saw active; all rows where that was not measured."""
    rows = bundle.weights.W_dec
    return rows if bundle.measured is None else rows[torch.from_numpy(bundle.measured.frequency > 0)]


def measure_stability(folders: Sequence[Path], blocks: Sequence[str]) -> list[dict[str, object]]:
    """Compare every two folders of bundles, block by block.

    Returns:
        A row for each block and two folders, by number: mean and median cosine of matched features, the share
        of 0.7 and more, and the mean cosine of as many random directions, which is chance.
    """
    rows: list[dict[str, object]] = []
    for block in blocks:
        active = [active_rows(load_bundle(folder / block)) for folder in folders]
        for (i, a), (j, b) in itertools.combinations(enumerate(active), 2):
            found = matched_cosines(a, b)
            generator = torch.Generator().manual_seed(0)
            chance = matched_cosines(
                torch.randn(a.shape, generator=generator), torch.randn(b.shape, generator=generator)
            )
            rows.append(
                {
                    "block": block,
                    "folders": f"{i} and {j}",
                    "features": len(found),
                    "mean_cosine": round(found.mean().item(), 4),
                    "median_cosine": round(found.median().item(), 4),
                    "share_above_0.7": round((found >= 0.7).double().mean().item(), 4),
                    "chance": round(chance.mean().item(), 4),
                }
            )
    return rows
