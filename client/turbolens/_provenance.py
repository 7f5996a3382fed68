"""The account of how a result was made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from turbolens._run import Run
from turbolens_proto.v1 import run_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA that is fused into the model's weights."""

    name: str
    weight: float
    hash: str
    """SHA-256 of its file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Provenance:
    """Everything needed to make a result again."""

    run: Run
    """As it was made: seeds and every default filled in."""
    model: str
    model_hash: str
    """SHA-256 of the U-Net's weights."""
    components_hash: str
    """SHA-256 over all that draws beside them."""
    sae_hashes: Mapping[str, str]
    """Of the SAEs that took part."""
    forced_sae: bool
    """An SAE was trained on another model than the one served, and the operator forced it."""
    versions: Mapping[str, str]
    """Of the server and of the libraries that decide numerics."""
    backend: str
    device: str
    dtype: str
    loras: tuple[Lora, ...] = ()
    """What was fused into the model's weights, in order."""

    @classmethod
    def from_proto(cls, message: run_pb2.Provenance) -> Provenance:
        """From the server's message.

        Raises:
            ValueError: its run holds an edit that this client does not know.
        """
        return cls(
            run=Run.from_proto(message.run),
            model=message.model,
            model_hash=message.model_hash,
            components_hash=message.components_hash,
            sae_hashes=dict(message.sae_hashes),
            forced_sae=message.forced_sae,
            versions=dict(message.versions),
            backend=message.backend,
            device=message.device,
            dtype=message.dtype,
            loras=tuple(Lora(lora.name, lora.weight, lora.hash) for lora in message.loras),
        )
