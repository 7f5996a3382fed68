"""What can be done to updates that no edit does: drop them, push them densely, or say them again in an SAE's words."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from turbolens_server.sae.sae import Sae
from turbolens_training.activations.taps import Intervention


def zero(blocks: Collection[str]) -> Intervention:
    """The blocks add nothing."""

    def intervene(_: int, block: str, update: Tensor) -> Tensor:
        return update.new_zeros(update.shape) if block in blocks else update

    return intervene


def shift(deltas: Mapping[str, Tensor]) -> Intervention:
    """Something is added to the updates: by hook point [T, N, P or 1, d_model]."""

    def intervene(step: int, block: str, update: Tensor) -> Tensor:
        return update.float() + deltas[block][step] if block in deltas else update

    return intervene


def splice(saes: Mapping[str, Sae]) -> Intervention:
    """The SAEs' reconstruction takes the place of the update."""

    def intervene(_: int, block: str, update: Tensor) -> Tensor:
        return reconstruct(saes[block], update) if block in saes else update

    return intervene


def reconstruct(sae: Sae, x: Tensor) -> Tensor:
    """The SAE's reconstruction of updates x [..., d_model], float32."""
    return sae.decode(sae.encode(x))
