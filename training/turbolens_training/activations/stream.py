"""Updates of the hook points, streamed from the engine's own taps: what is trained on is what is served.

Nothing is stored: a chunk is a function of (seed, index), so a run can go on anywhere, and the held-out data of an
evaluation is a seed. One pass of the U-Net feeds the SAEs of all blocks, ends at the last hook point where no later
step needs the prediction, and never reaches the VAE.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_server.unet.tapped import tapped_forward
from turbolens_training.activations.text import encode_captions
from turbolens_training.mini.captions import describe
from turbolens_training.mini.scenes import decode_scenes, sample_codes

TRAINING: Final = "training"
HELD_OUT: Final = "held out"
LABELLING: Final = "labelling"


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


@torch.inference_mode()
def collect_updates(engine: Engine, captions: Sequence[str], seeds: Sequence[int], steps: int) -> Updates:
    """Run the sampler as `Engine.run` does, and keep the updates instead of the pictures."""
    parts, info = engine.components, engine.info
    blocks = frozenset(point.name for point in info.hook_points)
    last = info.hook_points[-1].name
    hidden, pooled = encode_captions(parts.text, list(captions))
    device, dtype = hidden.device, hidden.dtype
    size = info.default_size
    time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=dtype, device=device).repeat(len(captions), 1)

    scheduler = type(parts.scheduler).from_config(parts.scheduler.config)
    scheduler.set_timesteps(steps, device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (len(captions), parts.unet.config.in_channels, *(edge // parts.vae_downscale for edge in size))
    noise = randn_tensor(shape, generator=generators, device=device, dtype=dtype)
    latents = noise * scheduler.init_noise_sigma

    kept: dict[str, list[Tensor]] = {point.name: [] for point in info.hook_points}

    def keep(name: str, update: Tensor, _: tuple[int, int]) -> Tensor:
        kept[name].append(update.float())
        return update

    for t in scheduler.timesteps:
        stop = last if len(kept[last]) == steps - 1 else None
        scaled = scheduler.scale_model_input(latents, t)
        prediction = tapped_forward(
            parts.unet, scaled, t, hidden, pooled, time_ids, tap=keep, at=blocks, stop_after=stop
        )
        if prediction is not None:
            latents = scheduler.step(prediction, t, latents, generator=generators).prev_sample
    timesteps = tuple(int(t) for t in scheduler.timesteps)
    by_block = {name: torch.stack(updates) for name, updates in kept.items()}
    return Updates(tuple(captions), tuple(seeds), noise, timesteps, by_block)


class SceneStream:
    """Updates of random captions of random scenes, a chunk at a time."""

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
        """Set what every chunk is drawn from.

        Args:
            engine: the model.
            seed: of everything random.
            split: which part of the data; streams of one seed and different splits share no draw.
            images: pictures of a chunk.
            one_step_share: share of chunks sampled in one step.
            multi_steps: the rest take one of these numbers of steps.
            complete: captions name every value, for measurements against the ground truth.
        """
        self._engine = engine
        self._key = f"{seed}/{split}"
        self._images = images
        self._one_step_share = one_step_share
        self._multi_steps = multi_steps
        self._complete = complete
        self.identity = engine.info.model_hash
        self.widths = {point.name: point.d_model for point in engine.info.hook_points}

    def steps_of(self, index: int) -> int:
        """Sampling steps of chunk `index`."""
        rng = random.Random(f"{self._key}/{index}/steps")
        return 1 if rng.random() < self._one_step_share else rng.choice(self._multi_steps)

    def chunk(self, index: int) -> Chunk:
        """Chunk `index`, the same every time."""
        rng = random.Random(f"{self._key}/{index}")
        codes = sample_codes(self._images, torch.Generator().manual_seed(rng.getrandbits(62)))
        captions = [describe(scene, rng, complete=self._complete) for scene in decode_scenes(codes)]
        seeds = [rng.getrandbits(62) for _ in captions]
        return Chunk(codes, collect_updates(self._engine, captions, seeds, self.steps_of(index)))

    def tokens(self, index: int, per_image: int) -> dict[str, Tensor]:
        """Chunk `index` as training data: by hook point, `per_image` positions of each picture and step, [n, d_model].

        The blocks of one chunk keep the same positions where their grids agree.
        """
        chunk = self.chunk(index)
        taken = {}
        for name, updates in chunk.updates.by_block.items():
            steps, images, positions, width = updates.shape
            generator = torch.Generator().manual_seed(index)
            order = torch.rand(steps * images, positions, generator=generator).argsort(1)[:, :per_image]
            index_of = order.to(updates.device)[..., None].expand(-1, -1, width)
            taken[name] = updates.flatten(0, 1).gather(1, index_of).flatten(0, 1)
        return taken


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
