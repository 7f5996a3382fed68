"""Scenes to steer towards a concept, and their pictures."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job
from turbolens_server.steering.edits import Edit
from turbolens_training.mini.captions import describe
from turbolens_training.mini.model import SCALING_FACTOR
from turbolens_training.mini.scenes import (
    BACKGROUND,
    BACKGROUNDS,
    COUNT,
    LAYOUT,
    PLACES,
    STYLE,
    STYLES,
    THING_FIELDS,
    decode_scenes,
    sample_codes,
    thing_column,
)
from turbolens_training.mini.tokenizer import build_tokenizer

_POOL: Final = 4096
"""Random scenes among which those fit for a concept are found."""


@dataclasses.dataclass(frozen=True)
class Concept:
    """An attribute at one of its values."""

    attribute: str
    value: str
    column: int
    """Of the scene's codes; of the first thing."""
    code: int

    @classmethod
    def all(cls) -> Iterator[Concept]:
        """Every concept of the world, attribute by attribute."""
        fields: list[tuple[str, int, tuple[str, ...]]] = [
            (name, thing_column(0, name), values) for name, values in THING_FIELDS
        ]
        fields += [("background", BACKGROUND, BACKGROUNDS), ("style", STYLE, STYLES), ("position", LAYOUT, PLACES)]
        for attribute, column, values in fields:
            for code, value in enumerate(values):
                yield cls(attribute, value, column, code)

    def __str__(self) -> str:
        return f"{self.attribute}={self.value}"


def reads_scenes(engine: Engine) -> bool:
    """Whether a model is of the embedded one's kind: only those draw captioned scenes whose truth is known."""
    return engine.components.text.vocabulary == frozenset(build_tokenizer().get_vocab())


def check_truth(engine: Engine, way_out: str) -> None:
    """Raise ValueError for a model whose pictures of captioned scenes have no truth."""
    if not reads_scenes(engine):
        raise ValueError(
            f"{engine.info.model}: what is measured here needs a model that draws the embedded one's captioned scenes, "
            f"whose truth is known, and its vocabulary is another; {way_out}"
        )


def pick_concepts(names: Sequence[str]) -> list[Concept]:
    """The named concepts, each `attribute=value`, in the world's order; all of them for no name.

    Raises:
        ValueError: there is no such concept.
    """
    everything = list(Concept.all())
    if unknown := set(names) - set(map(str, everything)):
        raise ValueError(f"no such concept: {', '.join(sorted(unknown))}; there are {', '.join(map(str, everything))}")
    return [concept for concept in everything if not names or str(concept) in names]


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Held-out scenes of one thing whose value of a concept is another."""

    codes: Tensor  # [N, CODE_DIM]
    prompts: list[str]
    seeds: list[int]
    noise: Tensor  # [N, 4, h, w], what the seeds give


def draw_scenes(engine: Engine, concept: Concept, n: int, key: str) -> Scenes:
    """Scenes for a concept; `key` names the draw."""
    rng = random.Random(f"{key}/{concept}")
    pool = sample_codes(_POOL, torch.Generator().manual_seed(rng.getrandbits(62)))
    fit = (pool[:, COUNT] == 1) & (pool[:, concept.column] != concept.code)
    codes = pool[fit][:n]
    prompts = [describe(scene, rng, complete=True) for scene in decode_scenes(codes)]
    seeds = [rng.getrandbits(31) for _ in prompts]
    height, width = (edge // engine.components.vae_downscale for edge in engine.info.default_size)
    channels = engine.components.unet.config.in_channels
    # As the engine draws it: one generator for each picture.
    noise = [torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return Scenes(codes, prompts, seeds, torch.cat(noise))


def generate(engine: Engine, scenes: Scenes, edit: Edit | None, batch: int) -> Tensor:
    """One-step pictures [N, 3, h, w] in [-1, 1], at the latent's resolution: its channels are RGB by construction."""
    height, width = engine.info.default_size
    edits = (edit,) if edit else ()
    jobs = [
        Job(p, s, 1, height, width, edits, picture=False) for p, s in zip(scenes.prompts, scenes.seeds, strict=True)
    ]
    results = [r for i in range(0, len(jobs), batch) for r in engine.run(jobs[i : i + batch]) if r is not None]
    latents = torch.stack([torch.from_numpy(result.latents) for result in results])
    return (latents[:, :3] / SCALING_FACTOR).clamp(-1, 1)
