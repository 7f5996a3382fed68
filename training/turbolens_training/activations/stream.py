"""Updates of the hook points, streamed from the engine's own taps: what is trained on is what is served.

Nothing is stored: a chunk is a function of (seed, index), so a run can go on anywhere, and the held-out data of an
evaluation is a seed. One pass of the U-Net feeds the SAEs of all blocks, ends at the last hook point where no later
step needs the prediction, and never reaches the VAE.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_training.activations.prompts import PromptSource, ScenePrompts
from turbolens_training.activations.taps import HookPointTap, begin

TRAINING: Final = "training"
HELD_OUT: Final = "held out"
LABELLING: Final = "labelling"


class StepUpdates(Protocol):
    """The updates of one batch of pictures, on a device or on disk."""

    @property
    def captions(self) -> tuple[str, ...]: ...

    @property
    def seeds(self) -> tuple[int, ...]: ...

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Of the T steps, falling."""
        ...

    @property
    def by_block(self) -> Mapping[str, Tensor | tuple[Tensor, ...]]:
        """By hook point: [T, N, P, d_model], or T of [N, P, d_model]; P positions in row order of the grid."""
        ...


@dataclasses.dataclass(frozen=True)
class Updates:
    """The updates of one batch of pictures at every step and hook point."""

    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    noise: Tensor  # [N, C, h, w], the first noise
    timesteps: tuple[int, ...]
    """Of the T steps, falling."""
    by_block: dict[str, Tensor]
    """By hook point: [T, N, P, d_model] float32, P positions in row order of the grid."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One batch of the stream: scenes and the updates they cause."""

    codes: Tensor  # [N, CODE_DIM], see `turbolens_training.mini.scenes`
    updates: Updates


def collect_updates(engine: Engine, captions: Sequence[str], seeds: Sequence[int], steps: int) -> Updates:
    """Walk as `Engine.run` does, and keep the updates instead of the pictures."""
    walk = begin(engine, captions, seeds, steps)
    tap = HookPointTap([point.name for point in engine.info.hook_points], keep=True)
    *before, last = walk.timesteps
    for t in before:
        walk.step(t, tap)
    walk.look(last, tap)
    timesteps = tuple(int(t) for t in walk.timesteps)
    return Updates(tuple(captions), tuple(seeds), walk.noise, timesteps, tap.updates())


def sample_tokens(by_block: Mapping[str, Tensor | tuple[Tensor, ...]], index: int, per_image: int) -> dict[str, Tensor]:
    """Updates as training data: `per_image` positions of each picture and step, by hook point.

    The blocks of one chunk keep the same positions where their grids agree.

    Args:
        by_block: by hook point, [T, N, P, d_model] or T of [N, P, d_model].
        index: of the chunk, which decides the positions.
        per_image: positions of a picture, at most; all where the grid has no more.

    Returns:
        By hook point, [T * N * per_image, d_model] float32.
    """
    taken = {}
    for name, updates in by_block.items():
        images, positions, width = updates[0].shape
        generator = torch.Generator().manual_seed(index)
        orders = torch.rand(len(updates) * images, positions, generator=generator).argsort(1)[:, :per_image]
        picks = orders.unflatten(0, (len(updates), images))[..., None].to(updates[0].device)
        parts = [at_step.gather(1, pick.expand(-1, -1, width)) for at_step, pick in zip(updates, picks, strict=True)]
        taken[name] = torch.cat(parts).flatten(0, 1).float()
    return taken


class PromptStream:
    """Updates of the pictures of many prompts, a chunk at a time."""

    chunks: int | None = None
    """Without end."""

    def __init__(
        self,
        engine: Engine,
        prompts: PromptSource,
        *,
        seed: int,
        split: str,
        images: int,
        one_step_share: float = 1.0,
        multi_steps: tuple[int, ...] = (),
    ) -> None:
        """Set what every chunk is drawn from.

        Args:
            engine: the model; its hook points are read.
            prompts: where prompts come from.
            seed: of everything random.
            split: which part of the data; streams of one seed and different splits share no draw.
            images: pictures of a chunk.
            one_step_share: share of chunks sampled in one step.
            multi_steps: the rest take one of these numbers of steps.
        """
        self.engine = engine
        self._prompts = prompts
        self.split = split
        self._key = f"{seed}/{split}"
        self._images = images
        self._one_step_share = one_step_share
        self._multi_steps = multi_steps
        self.widths = {point.name: point.d_model for point in engine.info.hook_points}
        self.kind = prompts.kind
        self.identity = "/".join(filter(None, (engine.info.model_hash, engine.info.components_hash, prompts.identity)))

    def recipe(self) -> dict[str, Any]:
        """All that decides a chunk beside its index, as plain values."""
        info = self.engine.info
        return {
            "model_hash": info.model_hash,
            "components_hash": info.components_hash,
            "dtype": info.dtype,
            "size": list(info.default_size),
            "hook_points": [point.name for point in info.hook_points],
            "prompts": self._prompts.identity,
            "key": self._key,
            "images": self._images,
            "one_step_share": self._one_step_share,
            "multi_steps": list(self._multi_steps),
        }

    def steps_of(self, index: int) -> int:
        """Sampling steps of chunk `index`."""
        rng = random.Random(f"{self._key}/{index}/steps")
        return 1 if rng.random() < self._one_step_share else rng.choice(self._multi_steps)

    def drawn(self, index: int) -> tuple[Sequence[str], list[int]]:
        """Captions and seeds of chunk `index`."""
        rng = self._rng(index)
        captions = self._prompts.draw(index, self._images, rng, held_out=self.split == HELD_OUT)
        return captions, [rng.getrandbits(62) for _ in captions]

    def updates(self, index: int) -> Updates:
        """Chunk `index`, the same every time."""
        return collect_updates(self.engine, *self.drawn(index), self.steps_of(index))

    def tokens(self, index: int, per_image: int) -> dict[str, Tensor]:
        """Chunk `index` as training data, see :func:`sample_tokens`."""
        return sample_tokens(self.updates(index).by_block, index, per_image)

    def _rng(self, index: int) -> random.Random:
        return random.Random(f"{self._key}/{index}")


class SceneStream(PromptStream):
    """Updates of random captions of random scenes: a stream that knows what its pictures should show."""

    def __init__(
        self,
        engine: Engine,
        *,
        seed: int,
        split: str,
        images: int,
        one_step_share: float = 1.0,
        multi_steps: tuple[int, ...] = (),
        complete: bool = False,
    ) -> None:
        """As :class:`PromptStream`; `complete`: captions name every value, for measurements against the truth."""
        self._scenes = ScenePrompts(complete=complete)
        super().__init__(
            engine,
            self._scenes,
            seed=seed,
            split=split,
            images=images,
            one_step_share=one_step_share,
            multi_steps=multi_steps,
        )

    def chunk(self, index: int) -> Chunk:
        """Chunk `index` with its scenes."""
        updates = self.updates(index)
        return Chunk(self._scenes.codes(len(updates.captions), self._rng(index)), updates)


def prompt_updates(
    engine: Engine, prompts: Sequence[str], *, seed: int, images: int, steps: Sequence[int]
) -> Iterator[Updates]:
    """Updates of given prompts, a chunk at a time, the same every time.

    Args:
        engine: the model.
        prompts: one for each picture.
        seed: of the pictures' seeds.
        images: pictures of a chunk.
        steps: sampling steps of the chunks, in turn.
    """
    for at, start in enumerate(range(0, len(prompts), images)):
        captions = prompts[start : start + images]
        rng = random.Random(f"{seed}/prompts/{at}")
        yield collect_updates(engine, captions, [rng.getrandbits(62) for _ in captions], steps[at % len(steps)])
