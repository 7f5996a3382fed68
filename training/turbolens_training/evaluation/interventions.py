"""What can be done to updates: drop them, swap them, push them, or say them again in an SAE's words."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from turbolens_server.sae.sae import Codes, Sae
from turbolens_training.activations.taps import Intervention


def zero(blocks: Collection[str]) -> Intervention:
    """The blocks add nothing."""

    def intervene(_: int, block: str, update: Tensor) -> Tensor:
        return update.new_zeros(update.shape) if block in blocks else update

    return intervene


def patch(updates: Mapping[str, Tensor]) -> Intervention:
    """The blocks add what they added in another run: by hook point [T, N, P, d_model]; other blocks are left alone."""

    def intervene(step: int, block: str, update: Tensor) -> Tensor:
        return updates[block][step] if block in updates else update

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


def decode_codes(sae: Sae, codes: Codes) -> Tensor:
    """Sum of decoder rows by activation, without b_dec: codes [..., K] -> [..., d_model]."""
    return sae.decode(codes) - sae.b_dec


def reconstruct(sae: Sae, x: Tensor) -> Tensor:
    """The SAE's reconstruction of updates x [..., d_model], float32."""
    return sae.decode(sae.encode(x))
