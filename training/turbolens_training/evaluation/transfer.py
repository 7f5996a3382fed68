"""Feature transfer between the runs of two captions, as RIEBench does it.

Two runs on the same noise: the *base* draws the caption as it is, the *reference* the edited one. Features are ranked
over all blocks together by the difference of their mean activations at the first step, each run's means as shares of
their sum. The first n (S) are given to the base with the activations that they have in the reference, position by
position and step by step; the last n (T) are taken from it with those that they have in the base itself:

    update' = update + m (sum over S of z_reference d - sum over T of z_base d)

The choice is the server's (`turbolens_server.steering.choice`), of many pictures at once here; to give and to take are
edits that it makes (`turbolens_training.evaluation.edits`).

Surkov et al., arXiv 2410.22366; github.com/wendlerc/RIEBench.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from turbolens_server.sae.sae import Codes, Sae
from turbolens_server.steering.choice import Sides, choose_features, mean_activations, normalized_mean_difference


@dataclasses.dataclass(frozen=True)
class EncodedPictures:
    """One run of a batch: its updates, their codes, and where it counts; each by hook point."""

    updates: dict[str, Tensor]  # [T, N, P, d_model]
    codes: dict[str, Codes]  # [T, N, P, K]
    masks: dict[str, Tensor]  # [N, P] in [0, 1]

    @classmethod
    def of(
        cls, saes: Mapping[str, Sae], updates: dict[str, Tensor], masks: dict[str, Tensor] | None = None
    ) -> EncodedPictures:
        """Encode a run's updates; without masks all of it counts."""
        kept = {block: updates[block] for block in saes}
        everywhere = {block: x.new_ones(x.shape[1:3]) for block, x in kept.items()}
        codes = {block: saes[block].encode(x) for block, x in kept.items()}
        return cls(kept, codes, everywhere if masks is None else masks)


def first_means(saes: Mapping[str, Sae], run: EncodedPictures) -> Tensor:
    """Mean activations at the first step where a run counts: [N, all features by block]."""
    return torch.cat(
        [
            mean_activations(run.codes[block].values[0], run.codes[block].indices[0], run.masks[block], len(sae.W_dec))
            for block, sae in saes.items()
        ],
        1,
    )


def choose_transferred(saes: Mapping[str, Sae], reference: EncodedPictures, base: EncodedPictures, n: int) -> Sides:
    """The features of each picture to give and to take, as the server chooses them."""
    means = [first_means(saes, run) for run in (reference, base)]
    return choose_features(normalized_mean_difference(*means), n)


def choose_random_active(
    saes: Mapping[str, Sae], reference: EncodedPictures, base: EncodedPictures, n: int, generator: torch.Generator
) -> Sides:
    """A baseline: n random features of those active in the reference to give, of those active in the base to take."""

    def draw(run: EncodedPictures) -> Tensor:
        pooled = first_means(saes, run) > 0
        lottery = torch.rand(pooled.shape, generator=generator).to(pooled.device) * pooled
        chosen = torch.zeros_like(pooled).scatter(1, lottery.topk(min(n, pooled.shape[1]), dim=1).indices, True)
        return chosen & pooled

    return Sides(draw(reference), draw(base))


def dense_deltas(reference: EncodedPictures, base: EncodedPictures, multiplier: float) -> dict[str, Tensor]:
    """The dense baseline: all of the reference's update is given and all of the base's taken, SAEs or not."""
    return {
        block: multiplier * (x * reference.masks[block][..., None] - base.updates[block] * base.masks[block][..., None])
        for block, x in reference.updates.items()
    }
