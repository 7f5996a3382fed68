"""Which features tell one run from another: the choice of a transfer that names none.

The mean activation of every feature over a run, as its share of the sum over all features of all SAEs, is compared
between a reference and the picture's own run. What has most more of it in the reference is given, what has most less of
it is taken. The slow twin is `turbolens_server.steering.twin.choose_dense`.

Surkov et al., arXiv 2410.22366; github.com/wendlerc/RIEBench.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from turbolens_server.steering.masks import Mask

if TYPE_CHECKING:  # settings of commands are read beside this, and must not wait for torch
    from torch import Tensor

_LEAST = 1e-6
"""Of a sum that something is divided by."""


@dataclasses.dataclass(frozen=True, slots=True)
class FeatureChoice:
    """What a request leaves to the server."""

    edit: int
    """Position of the edit in its request."""
    features: int
    """To give, and to take, at most."""
    saes: tuple[str, ...]
    all_steps: bool = False
    """Means over all steps; else over the first."""
    own_mask: Mask | None = None
    """Where the picture's own run counts and is taken from; None: everywhere."""


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredFeature:
    """A feature and its score."""

    sae: str
    index: int
    score: float


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """What a choice came to in one picture."""

    edit: int
    """Position of the edit in its request."""
    given: tuple[ScoredFeature, ...]
    """The highest score first."""
    taken: tuple[ScoredFeature, ...]
    """The lowest score first."""


@dataclasses.dataclass(frozen=True)
class Sides:
    """What is given and what is taken, of every picture of a batch."""

    given: Tensor  # [N, F] bool
    taken: Tensor  # [N, F] bool


def mean_activations(values: Tensor, indices: Tensor, mask: Tensor, d_sae: int) -> Tensor:
    """Mean activation of every feature over the positions of each picture, weighted by a mask.

    Args:
        values: activations, [N, P, K], zero where there is none.
        indices: their features, [N, P, K].
        mask: [N, P] in [0, 1].
        d_sae: number of features.

    Returns:
        [N, d_sae] float32.
    """
    weighted = (values * mask[..., None]).flatten(1)
    sums = mask.new_zeros(len(mask), d_sae).float().scatter_add_(1, indices.flatten(1), weighted)
    return sums / mask.sum(1, keepdim=True).clamp(min=_LEAST)


def normalized_mean_difference(reference: Tensor, own: Tensor) -> Tensor:
    """How much larger each feature's share of the mean activation is in the reference: of means [N, F] each, [N, F]."""
    shares = [means / means.sum(1, keepdim=True).clamp(min=_LEAST) for means in (reference, own)]
    return shares[0] - shares[1]


def choose_features(scores: Tensor, n: int) -> Sides:
    """The n best features of each picture to give, and the n worst to take: fewer where fewer have a score.

    Only what has more of the activation in the reference is given, and only what has less is taken. The published code
    fills up with features of score 0, in whatever order its sort leaves them; at several steps these are not all zero.

    Args:
        scores: [N, F].
        n: at least 1.
    """
    if n < 1:
        raise ValueError(f"features={n}: expected at least 1")
    order = scores.argsort(dim=1, descending=True, stable=True)
    nothing, most = scores.new_zeros(scores.shape).bool(), min(n, scores.shape[1])
    given, taken = (nothing.scatter(1, some, True) for some in (order[:, :most], order[:, -most:]))
    return Sides(given & (scores > 0), taken & (scores < 0))
