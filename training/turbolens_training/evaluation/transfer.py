"""Feature transfer between the runs of two captions, as RIEBench does it.

Two runs on the same noise: the *base* draws the caption as it is, the *reference* the edited one. Features are ranked
over all blocks together by the difference of their mean activations at the first step, each run's means as shares of
their sum. The first n (S) are given to the base with the activations that they have in the reference, position by
position and step by step; the last n (T) are taken from it with those that they have in the base itself:

    update' = update + m (sum over S of z_reference d - sum over T of z_base d)

Here they are chosen; to give and to take are edits that the server makes (`turbolens_training.evaluation.edits`).

Surkov et al., arXiv 2410.22366; github.com/wendlerc/RIEBench.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from turbolens_server.sae.sae import Codes, Sae


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


def mean_activations(codes: Codes, mask: Tensor, d_sae: int) -> Tensor:
    """Mean activation of every feature over each picture: codes [N, P, K], mask [N, P] -> [N, d_sae]."""
    weighted = (codes.values * mask[..., None]).flatten(1)
    sums = torch.zeros(len(mask), d_sae, device=mask.device).scatter_add_(1, codes.indices.flatten(1), weighted)
    return sums / mask.sum(1, keepdim=True).clamp(min=1e-6)


def normalized_mean_difference(saes: Mapping[str, Sae], reference: EncodedPictures, base: EncodedPictures) -> Tensor:
    """How much larger each feature's share of the mean activation is in the reference: [N, all features by block]."""

    def shares(run: EncodedPictures) -> Tensor:
        means = []
        for block, sae in saes.items():
            first = Codes(run.codes[block].values[0], run.codes[block].indices[0])
            means.append(mean_activations(first, run.masks[block], sae.W_dec.shape[0]))
        pooled = torch.cat(means, 1)
        return pooled / pooled.sum(1, keepdim=True).clamp(min=1e-6)

    return shares(reference) - shares(base)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The features of one batch of edits, over all blocks together."""

    given: Tensor  # [N, all features] bool, S
    taken: Tensor  # [N, all features] bool, T


def choose_features(scores: Tensor, n: int) -> Choice:
    """The n best features of each picture to give, and the n worst to take: fewer where fewer have a score.

    Only what has more of the activation in the reference is given, and only what has less is taken. The published code
    fills up with features of score 0, in whatever order its sort leaves them; at several steps these are not all zero.

    Args:
        scores: [N, all features].
        n: at least 1.
    """
    if n < 1:
        raise ValueError(f"features={n}: expected at least 1")
    order = scores.argsort(dim=1, descending=True, stable=True)
    nothing, most = torch.zeros_like(scores, dtype=torch.bool), min(n, scores.shape[1])
    given, taken = (nothing.scatter(1, some, True) for some in (order[:, :most], order[:, -most:]))
    return Choice(given & (scores > 0), taken & (scores < 0))


def choose_random_active(
    saes: Mapping[str, Sae], reference: EncodedPictures, base: EncodedPictures, n: int, generator: torch.Generator
) -> Choice:
    """A baseline: n random features of those active in the reference to give, of those active in the base to take."""

    def draw(run: EncodedPictures) -> Tensor:
        active = []
        for block, sae in saes.items():
            first = Codes(run.codes[block].values[0], run.codes[block].indices[0])
            active.append(mean_activations(first, run.masks[block], sae.W_dec.shape[0]) > 0)
        pooled = torch.cat(active, 1)
        lottery = torch.rand(pooled.shape, generator=generator).to(pooled.device) * pooled
        chosen = torch.zeros_like(pooled).scatter(1, lottery.topk(min(n, pooled.shape[1]), dim=1).indices, True)
        return chosen & pooled

    return Choice(draw(reference), draw(base))


def dense_deltas(reference: EncodedPictures, base: EncodedPictures, multiplier: float) -> dict[str, Tensor]:
    """The dense baseline: all of the reference's update is given and all of the base's taken, SAEs or not."""
    return {
        block: multiplier * (x * reference.masks[block][..., None] - base.updates[block] * base.masks[block][..., None])
        for block, x in reference.updates.items()
    }
