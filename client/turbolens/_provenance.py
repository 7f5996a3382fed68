"""The account of how a result was made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from turbolens._edits import FeatureRef
from turbolens._png import read_text
from turbolens._run import Run
from turbolens_proto.v1 import run_pb2, steering_pb2

PNG_KEYWORD: Final = "turbolens"
"""Of the text in a PNG that is its provenance."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA that is fused into the model's weights."""

    name: str
    weight: float
    hash: str
    """SHA-256 of its file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """What the server chose for one picture and one edit that left it the choice."""

    seed: int
    edit: int
    """Position in the run's edits."""
    given: Mapping[FeatureRef, float]
    """Features that were given and their scores, the highest first: their share of the mean activation in the reference
    less that in the picture's own run. `list(given)` goes into an edit."""
    taken: Mapping[FeatureRef, float]
    """Features that were taken, the lowest score first."""
    prompt_index: int = 0
    """Position of the picture's prompt in the run's."""

    @classmethod
    def from_proto(cls, message: run_pb2.ChosenFeatures) -> Chosen:
        """From the server's message."""
        given, taken = (
            {FeatureRef(one.feature.sae, one.feature.index): one.score for one in side}
            for side in (message.given, message.taken)
        )
        return cls(message.seed, message.edit, given, taken, message.prompt_index)

    def to_proto(self) -> run_pb2.ChosenFeatures:
        """As a message."""
        given, taken = (
            [
                run_pb2.ScoredFeature(feature=steering_pb2.FeatureRef(sae=ref.sae, index=ref.index), score=score)
                for ref, score in side.items()
            ]
            for side in (self.given, self.taken)
        )
        return run_pb2.ChosenFeatures(
            seed=self.seed, edit=self.edit, given=given, taken=taken, prompt_index=self.prompt_index
        )


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
    chosen: tuple[Chosen, ...] = ()
    """What the server chose, where an edit left it the choice."""
    gate_hash: str = ""
    """Of the learned region gates, where the run heard through them."""
    forced_gate: bool = False
    """They were trained on another model than the one served, and the operator forced them."""

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
            chosen=tuple(Chosen.from_proto(chosen) for chosen in message.chosen),
            gate_hash=message.gate_hash,
            forced_gate=message.forced_gate,
        )

    def to_proto(self) -> run_pb2.Provenance:
        """As a message."""
        return run_pb2.Provenance(
            run=self.run.to_proto(),
            model=self.model,
            model_hash=self.model_hash,
            components_hash=self.components_hash,
            sae_hashes=self.sae_hashes,
            forced_sae=self.forced_sae,
            versions=self.versions,
            backend=self.backend,
            device=self.device,
            dtype=self.dtype,
            loras=[run_pb2.Lora(name=lora.name, weight=lora.weight, hash=lora.hash) for lora in self.loras],
            chosen=[chosen.to_proto() for chosen in self.chosen],
            gate_hash=self.gate_hash,
            forced_gate=self.forced_gate,
        )

    def chosen_for(self, seed: int, prompt_index: int = 0) -> tuple[Chosen, ...]:
        """What was chosen for the picture of one seed and prompt, by edit."""
        mine = (one for one in self.chosen if (one.seed, one.prompt_index) == (seed, prompt_index))
        return tuple({one.edit: one for one in mine}.values())

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """From what :meth:`to_json` made.

        Raises:
            ValueError: the text is no provenance.
        """
        from google.protobuf import json_format

        try:
            return cls.from_proto(json_format.Parse(text, run_pb2.Provenance()))
        except json_format.ParseError as error:
            raise ValueError(f"no provenance: {error}") from None

    def to_json(self) -> str:
        """As JSON in ASCII, to keep or send: the contract's `Provenance`."""
        from google.protobuf import json_format

        return json_format.MessageToJson(self.to_proto(), indent=None, ensure_ascii=True)

    @classmethod
    def from_png(cls, file: str | Path) -> Provenance:
        """Of a picture that :meth:`Picture.save` wrote as a PNG.

        Raises:
            ValueError: the file is no PNG, or holds no provenance.
            OSError: it cannot be read.
        """
        text = read_text(Path(file), PNG_KEYWORD)
        if text is None:
            raise ValueError(f"{file}: holds no provenance; PNGs of finished pictures that TurboLens saved do")
        return cls.from_json(text)
