"""Which features fire together, on disk: `co_firing.safetensors` in a bundle's folder, the first few of each feature.

Its one home: whoever counts writes it here, and the server reads it here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from turbolens_server.files import first_line
from turbolens_server.sae.bundle import CO_FIRING_FILE, BundleError, amend_bundle

KEPT: Final = 16
"""Of each feature, at most."""


@dataclasses.dataclass(frozen=True)
class CoFiring:
    """Of each feature, those that fire with it most, the first first."""

    others: npt.NDArray[np.int32]
    """[d_sae, n]; meaningless where the Jaccard index is 0."""
    jaccard: npt.NDArray[np.float32]
    """[d_sae, n], falling: positions where both are active as a share of those where either is."""

    def of(self, index: int) -> list[tuple[int, float]]:
        """Those of one feature, with the Jaccard index of each."""
        row = zip(self.others[index], self.jaccard[index], strict=True)
        return [(int(other), float(share)) for other, share in row if share > 0]


def write_co_firing(folder: Path, found: CoFiring, **about: Any) -> None:
    """Write it beside a bundle's weights, and in its provenance what it was counted on.

    Raises:
        WriteError: it cannot be written; what was there stays.
    """
    content = save({"others": found.others, "jaccard": found.jaccard})
    amend_bundle(folder, {CO_FIRING_FILE: content}, co_firing=about)


def read_co_firing(folder: Path | None, d_sae: int) -> CoFiring | None:
    """What a bundle has of it; None where nobody counted.

    Raises:
        BundleError: the file is malformed.
    """
    if folder is None or not (folder / CO_FIRING_FILE).exists():
        return None
    path = folder / CO_FIRING_FILE
    try:
        tensors = load_file(path)
        found = CoFiring(tensors["others"], tensors["jaccard"])
    except Exception as error:  # safetensors raises many kinds for broken files
        raise BundleError(f"{path}: unreadable ({first_line(error)})") from error
    others, jaccard = found.others, found.jaccard
    if others.ndim != 2 or len(others) != d_sae or others.shape != jaccard.shape:
        raise BundleError(f"{path}: shapes {others.shape} and {jaccard.shape}, expected ({d_sae}, n) of both")
    if not (np.issubdtype(others.dtype, np.integer) and np.issubdtype(jaccard.dtype, np.floating)):
        raise BundleError(f"{path}: others is {others.dtype} and jaccard {jaccard.dtype}, expected indices and shares")
    if not ((jaccard >= 0) & (jaccard <= 1)).all() or ((others < 0) | (others >= d_sae)).any():
        raise BundleError(f"{path}: holds shares outside 0 to 1, or features outside 0 to {d_sae - 1}")
    return found
