"""How well `mini` draws what a caption says, measured against the exact picture it should have drawn.

The counterfactual test: for each attribute of a scene, render the scene with that attribute at every other value and
the same jitter, and ask whether the generated picture is nearest (squared RGB error over the whole picture) to the
rendering of its own caption.
"""

from __future__ import annotations

import dataclasses
import io
import random
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from turbolens_training.mini.captions import describe
from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import (
    BACKGROUND,
    BACKGROUNDS,
    COUNT,
    LAYOUT,
    LAYOUTS,
    PLACES,
    STYLE,
    STYLES,
    THING_FIELDS,
    decode_scenes,
    jitter_from_noise,
    sample_codes,
    thing_column,
)

HELD_OUT_SEED = 2**31 - 1
"""Seed of the held-out scenes; training draws from generators seeded by text, which never gives this one."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Scenes the model was not trained on, with a caption, a first noise and the exact picture of each."""

    codes: Tensor  # [N, CODE_DIM]
    captions: list[str]
    noise: Tensor  # [N, 4, size, size]

    @classmethod
    def draw(cls, n: int, size: int, seed: int = HELD_OUT_SEED) -> HeldOut:
        generator = torch.Generator().manual_seed(seed)
        codes = sample_codes(n, generator)
        rng = random.Random(seed)
        captions = [describe(scene, rng, complete=True) for scene in decode_scenes(codes)]
        return cls(codes, captions, torch.randn(n, 4, size, size, generator=generator))

    def pictures(self, size: int) -> tuple[Tensor, Tensor]:
        """Exact pictures [N, 3, size, size] and cover [N, 1, size, size]."""
        return render(self.codes, jitter_from_noise(self.noise), size)


def counterfactuals(codes: Tensor) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Yield (attribute, rows, variants, values) for each attribute that scenes have.

    `rows` [R] indexes the scenes that have the attribute, and `variants` [R, values, CODE_DIM] are those scenes with
    it at every value; variant 0 is the scene itself.
    """

    def swept(rows: Tensor, column: int, values: range) -> Tensor:
        own = codes[rows, column]
        variants = codes[rows][:, None].repeat(1, len(values), 1)
        table = torch.tensor(list(values))
        order = torch.stack([torch.cat([v[None], table[table != v]]) for v in own]) if len(rows) else table[None][:0]
        variants[:, :, column] = order
        return variants

    for slot in range(2):
        rows = (codes[:, COUNT] > slot).nonzero()[:, 0]
        for field, vocabulary in THING_FIELDS:
            yield field, rows, swept(rows, thing_column(slot, field), range(len(vocabulary))), len(vocabulary)
    everything = torch.arange(len(codes))
    yield "background", everything, swept(everything, BACKGROUND, range(len(BACKGROUNDS))), len(BACKGROUNDS)
    seen = (codes[:, COUNT] > 0).nonzero()[:, 0]
    yield "style", seen, swept(seen, STYLE, range(len(STYLES))), len(STYLES)
    single = (codes[:, COUNT] == 1).nonzero()[:, 0]
    yield "position", single, swept(single, LAYOUT, range(len(PLACES))), len(PLACES)
    # Two things can be the other way round as well as in the other relation: four arrangements.
    pair = (codes[:, COUNT] == 2).nonzero()[:, 0]
    both = swept(pair, LAYOUT, range(len(PLACES), len(LAYOUTS)))
    exchanged = torch.cat([both[..., :4], both[..., 8:12], both[..., 4:8]], -1)
    keep = (both[:, 0, 4:8] != both[:, 0, 8:12]).any(1)
    yield "relation", pair[keep], torch.cat([both, exchanged], 1)[keep], 4


@dataclasses.dataclass(frozen=True)
class Score:
    """One attribute's result."""

    right: float
    """Share of scenes whose picture is nearest to its own caption's rendering."""
    chance: float
    count: int


def score_attributes(codes: Tensor, noise: Tensor, pictures: Tensor) -> dict[str, Score]:
    """The counterfactual test.

    Args:
        codes: [N, CODE_DIM] scenes.
        noise: [N, 4, h, w] their first noises, which decide the jitter.
        pictures: [N, 3, H, H] what was drawn, in [-1, 1].
    """
    jitter = jitter_from_noise(noise)
    size = pictures.shape[-1]
    right: dict[str, list[Tensor]] = {}
    chance: dict[str, float] = {}
    for attribute, rows, variants, values in counterfactuals(codes):
        for some, few in zip(rows.split(64), variants.split(64), strict=True):
            each = few.shape[1]
            rendered, _ = render(few.flatten(0, 1), jitter[some].repeat_interleave(each, 0), size)
            error = (rendered.unflatten(0, (-1, each)) - pictures[some][:, None]).square().mean((2, 3, 4))
            right.setdefault(attribute, []).append(error.argmin(1) == 0)
        chance[attribute] = 1 / values
    return {
        name: Score(torch.cat(hits).float().mean().item(), chance[name], sum(len(h) for h in hits))
        for name, hits in right.items()
    }


def psnr(drawn: Tensor, exact: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture [B], over the pixels where `mask` [B, 1, H, W] > 0.5."""
    error = (drawn - exact).square()
    if mask is None:
        mse = error.mean((1, 2, 3))
    else:
        inside = (mask > 0.5).float()
        mse = (error * inside).sum((1, 2, 3)) / (3 * inside.sum((1, 2, 3))).clamp(min=1)
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))


def quick_scores(
    generate: Callable[[list[str], Tensor], Tensor], size: int, n: int = 96
) -> tuple[dict[str, float], Tensor]:
    """Score a one-step generator on its latents' RGB channels, without a VAE.

    Returns the scores and the pictures for :func:`progress_sheet`, [2, n, 3, size, size]: exact, drawn.
    """
    held = HeldOut.draw(n, size)
    latents = torch.cat(
        [generate(held.captions[i : i + 32], held.noise[i : i + 32]).float().cpu() for i in range(0, n, 32)]
    )
    drawn = (latents[:, :3] / 1.5).clamp(-1, 1)
    exact, cover = (functional.avg_pool2d(p, 2) for p in held.pictures(2 * size))
    scores = {"psnr": psnr(drawn, exact).mean().item()}
    some = held.codes[:, COUNT] > 0
    scores["psnr_things"] = psnr(drawn[some], exact[some], cover[some]).mean().item()
    scores |= {name: score.right for name, score in score_attributes(held.codes, held.noise, drawn).items()}
    return {name: round(value, 3) for name, value in scores.items()}, torch.stack([exact, drawn])


def to_image(pictures: Tensor) -> Image.Image:
    """A row-major sheet [rows, columns, 3, H, W] in [-1, 1] as one image."""
    rows, columns, _, height, width = pictures.shape
    sheet = pictures.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    return Image.fromarray(((sheet + 1) * 127.5).round().clamp(0, 255).byte().numpy())


def as_png(image: Image.Image) -> bytes:
    """An image as a PNG, as small as it gets."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def progress_sheet(pairs: Tensor, columns: int = 12, rows: int = 4) -> Image.Image:
    """Exact pictures above drawn ones, [2, n, 3, H, W] -> an image."""
    shown = pairs[:, : rows * columns].unflatten(1, (rows, columns)).transpose(0, 1).flatten(0, 1)
    image = to_image(shown)
    factor = max(1, 96 // pairs.shape[-1])
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
