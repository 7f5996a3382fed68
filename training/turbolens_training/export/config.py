"""Settings of the export; the docstrings are the commands' help."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Gates:
    """Thresholds of the export; what is below one is refused with the reason."""

    explained_variance: float = 0.8
    """Least explained variance on held-out data, all timesteps together."""
    dead: float = 0.05
    """Largest share of dead features."""
    l0: float = 1.5
    """Largest mean number of active features on held-out data, in multiples of the `k` that was aimed at: a learnt
    threshold can settle far above it."""
    norm_tolerance: float = 1e-3
    """Largest distance of a decoder row's norm from 1."""

    def __post_init__(self) -> None:
        for name, most in (("explained_variance", 1.0), ("dead", 1.0), ("l0", math.inf), ("norm_tolerance", math.inf)):
            if not 0 <= getattr(self, name) <= most:  # not-a-number too
                raise ValueError(f"gates.{name}={getattr(self, name)}, expected 0 to {most:g}")
