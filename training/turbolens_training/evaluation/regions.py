"""Regions on ground truth: do two things come out as they were said, with phrases under masks and without?"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job, Region
from turbolens_server.loading.load import load_engine
from turbolens_server.steering.masks import Box, BoxMask
from turbolens_training.evaluation.config import RegionsConfig
from turbolens_training.evaluation.plots import labelled_grid
from turbolens_training.evaluation.sampling import decode, thumbnails
from turbolens_training.measures.concepts import check_truth
from turbolens_training.measures.counterfactual import interval
from turbolens_training.measures.report import fill, markdown_table, write_table
from turbolens_training.mini.captions import describe, plain_caption
from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import (
    COUNT,
    LAYOUT,
    LAYOUTS,
    PLACES,
    THING_FIELDS,
    Scene,
    decode_scenes,
    jitter_from_noise,
    sample_codes,
    thing_column,
)

_HALVES: Final = {
    "left of": (Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)),
    "above": (Box(0, 0, 1, 0.5), Box(0, 0.5, 1, 1)),
}
_SIDES: Final = {"left of": ("left", "right"), "above": ("top", "bottom")}
_BOUND: Final = ("color", "shape", "texture")
_FIELDS: Final = tuple((name, values) for name, values in THING_FIELDS if name in _BOUND)
GATED: Final = ", gates"
"""What is added to the name of a way that is heard through learned gates."""
_LITTLE: Final = 1.05
BINDS, LEAKS, RELATES = "all of both", "leaked", "arrangement"
CLAIMS: Final = (
    ("2509.15357: learned gates bind attributes better", BINDS, "prompt, gates", "prompt"),
    ("2509.15357: learned gates leak less", LEAKS, "prompt, gates", "prompt"),
    ("2509.15357: learned gates get relations right more often", RELATES, "prompt, gates", "prompt"),
    ("regions bind attributes better than the prompt alone", BINDS, "prompt, regions", "prompt"),
    ("regions leak less than the prompt alone", LEAKS, "prompt, regions", "prompt"),
    ("regions get relations right more often than the prompt alone", RELATES, "prompt, regions", "prompt"),
    ("regions bind better than learned gates", BINDS, "prompt, regions", "prompt, gates"),
    ("gates bind better where regions are heard too", BINDS, "prompt, regions, gates", "prompt, regions"),
    ("whole phrases bind what the prompt does not say", BINDS, "background alone, regions in full", "background alone"),
    ("whole phrases get relations right that the prompt does not say", RELATES, "background alone, regions in full",
     "background alone"),
    ("whole phrases win over a prompt that says the opposite", RELATES, "exchanged prompt, regions in full",
     "exchanged prompt"),
)  # fmt: skip
"""What is claimed, the measure, and the two ways of saying a scene that are compared."""
Said = tuple[str, tuple[str, ...]]
"""A prompt, and the phrases under the two halves; none: no regions."""


def exchanged(scene: Scene) -> Scene:
    """The scene with its two things in each other's places."""
    return dataclasses.replace(scene, things=scene.things[::-1])


def phrases(scene: Scene) -> tuple[str, ...]:
    """What each thing is, and nothing of the scene."""
    alone = (plain_caption(Scene((thing,), "left", scene.background)) for thing in scene.things)
    return tuple(caption.partition(" on the left")[0] for caption in alone)


def full_phrases(scene: Scene) -> tuple[str, ...]:
    """What each thing is, with its place, the background and the style: a whole prompt of one thing."""
    pairs = zip(scene.things, _SIDES[scene.layout], strict=True)
    return tuple(plain_caption(dataclasses.replace(scene, things=(thing,), layout=side)) for thing, side in pairs)


def _ground(scene: Scene) -> str:
    return plain_caption(dataclasses.replace(scene, things=(), layout="center"))


HEARD: Final[Mapping[str, Callable[[Scene], tuple[str, ...]]]] = {
    "": lambda _: (),
    ", regions": phrases,
    ", regions in full": full_phrases,
}
"""What each half hears beside the prompt: nothing, its thing's phrase, or a whole prompt of its thing."""


@dataclasses.dataclass(frozen=True)
class TwoThings:
    """Scenes of two things that differ in color, shape and texture or some of them."""

    codes: Tensor  # [N, CODE_DIM]
    scenes: list[Scene]
    captions: list[str]
    wrong: list[str]
    """Captions of the scenes exchanged."""
    seeds: list[int]
    noise: Tensor  # [N, 4, h, w]

    @classmethod
    def draw(cls, engine: Engine, n: int, seed: int) -> TwoThings:
        """Scenes by a seed, none of which training draws from."""
        rng = random.Random(f"{seed}/regions")
        pool = sample_codes(4 * n, torch.Generator().manual_seed(rng.getrandbits(62)))
        bound = [[thing_column(slot, name) for name in _BOUND] for slot in range(2)]
        codes = pool[(pool[:, COUNT] == 2) & (pool[:, bound[0]] != pool[:, bound[1]]).any(1)][:n]
        scenes = decode_scenes(codes)
        captions = [describe(scene, rng, complete=True) for scene in scenes]
        wrong = [describe(exchanged(scene), rng, complete=True) for scene in scenes]
        seeds = [rng.getrandbits(31) for _ in scenes]
        height, width = (edge // engine.components.vae_downscale for edge in engine.info.default_size)
        channels = engine.components.unet.config.in_channels
        noise = [torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return cls(codes, scenes, captions, wrong, seeds, torch.cat(noise))

    def part(self, start: int, end: int) -> TwoThings:
        """Some of the scenes."""
        return TwoThings(**{field.name: getattr(self, field.name)[start:end] for field in dataclasses.fields(self)})

    def methods(self) -> dict[str, list[Said]]:
        """What is said of each scene, by the name of how."""
        prompts = {
            "prompt": self.captions,
            "background alone": [_ground(scene) for scene in self.scenes],
            "exchanged prompt": self.wrong,
        }
        return {
            prompt + heard: [(text, of(scene)) for text, scene in zip(texts, self.scenes, strict=True)]
            for prompt, texts in prompts.items()
            for heard, of in HEARD.items()
        }


def draw_all(
    engine: Engine, said: Sequence[Said], scenes: TwoThings, batch: int, *, gate: bool = False, steps: int = 1
) -> Tensor:
    """Latents of so many steps, [N, C, h, w]; `gate`: through the engine's learned gates."""
    jobs = [
        Job(
            prompt, seed, steps, *engine.info.default_size, picture=False, gate=gate,
            regions=tuple(
                Region(BoxMask((half,)), phrase) for half, phrase in zip(_HALVES[scene.layout], heard, strict=False)
            ),
        )
        for (prompt, heard), seed, scene in zip(said, scenes.seeds, scenes.scenes, strict=True)
    ]  # fmt: skip
    found = [r for i in range(0, len(jobs), batch) for r in engine.run(jobs[i : i + batch]) if r is not None]
    return torch.stack([torch.from_numpy(result.latents) for result in found])


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The scenes drawn in one way."""

    latents: Tensor  # [N, C, h, w]
    seconds: Tensor  # [batches]


def draw_in_turns(
    engine: Engine, methods: Mapping[str, tuple[Sequence[Said], bool]], scenes: TwoThings, batch: int
) -> dict[str, Drawn]:
    """Every way by turns, a batch each, so that times compare; a way is what is said, and whether through gates."""
    latents: dict[str, list[Tensor]] = {name: [] for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for start in tqdm(range(0, len(scenes.seeds), batch), desc="regions", unit="batch"):
        some = scenes.part(start, start + batch)
        # Encoded first, or whichever way comes first would pay for it and the others find it kept.
        texts = {text for said, _ in methods.values() for prompt, heard in said[start : start + batch]
                 for text in (prompt, *heard)}  # fmt: skip
        with torch.inference_mode():
            engine.components.text.encode_all(sorted(texts))
        for name, (said, gate) in methods.items():
            began = time.perf_counter()
            latents[name].append(draw_all(engine, said[start : start + batch], some, batch, gate=gate))
            seconds[name].append(time.perf_counter() - began)
    return {name: Drawn(torch.cat(each), torch.tensor(seconds[name])) for name, each in latents.items()}


def nearest(codes: Tensor, noise: Tensor, pictures: Tensor, column: int, values: int) -> Tensor:
    """The value of a column of the scenes' codes whose rendering each picture [N, 3, h, w] is nearest to, [N]."""
    jitter, errors = jitter_from_noise(noise), []
    for value in range(values):
        other = codes.clone()
        other[:, column] = value
        errors.append((render(other, jitter, pictures.shape[-1])[0] - pictures).square().mean((1, 2, 3)))
    return torch.stack(errors, 1).argmin(1)


def arrangement_right(codes: Tensor, noise: Tensor, pictures: Tensor) -> Tensor:
    """Whether each picture is nearest to its own arrangement of the four: either relation, either way round, [N]."""
    jitter, errors = jitter_from_noise(noise), []
    for things in (codes, torch.cat([codes[:, :4], codes[:, 8:12], codes[:, 4:8]], 1)):
        for layout in range(len(PLACES), len(LAYOUTS)):
            other = things.clone()
            other[:, LAYOUT] = layout
            errors.append((render(other, jitter, pictures.shape[-1])[0] - pictures).square().mean((1, 2, 3)))
    own = codes[:, LAYOUT] - len(PLACES)  # of the first half of the errors
    return torch.stack(errors, 1).argmin(1) == own


def score(scenes: TwoThings, pictures: Tensor) -> dict[str, Tensor]:
    """What is right in pictures [N, 3, h, w], true or false of each thing or picture, in one order for all pictures of
    the same scenes.

    An attribute of a thing is right where the picture is nearest to its own value's rendering, of all values. It leaked
    where it is nearest to the *other* thing's, of those that differ.
    """
    right: dict[str, list[Tensor]] = {}
    leaked: list[Tensor] = []
    for name, values in _FIELDS:
        for slot in range(2):
            column, others = thing_column(slot, name), scenes.codes[:, thing_column(1 - slot, name)]
            own = scenes.codes[:, column]
            shown = nearest(scenes.codes, scenes.noise, pictures, column, len(values))
            right.setdefault(name, []).append(shown == own)
            leaked.append((shown == others)[own != others])
    both = torch.stack([hits for each in right.values() for hits in each]).all(0)
    rows = {name: torch.cat(each) for name, each in right.items()}
    rows |= {
        BINDS: both,
        RELATES: arrangement_right(scenes.codes, scenes.noise, pictures),
        LEAKS: torch.cat(leaked),
    }
    return rows


def shares(hits: Mapping[str, Tensor]) -> dict[str, object]:
    """A row of the table: shares with Wilson's intervals at 95 %."""
    return {name: _share(each) for name, each in hits.items()}


def judge_claims(scored: Mapping[str, Mapping[str, Tensor]]) -> list[dict[str, object]]:
    """What one way of saying a scene wins over another, of the same scenes: differences in per cent of pictures or
    things, with their intervals at 95 % over pairs."""
    found = []
    for claim, measure, mine, other in CLAIMS:
        if not {mine, other} <= scored.keys():
            continue
        ours, theirs = (scored[name][measure].double() for name in (mine, other))
        gaps = (ours - theirs) * (-1 if measure == LEAKS else 1)
        mean, half = 100 * gaps.mean().item(), 196 * gaps.std(correction=0).item() / len(gaps) ** 0.5
        holds = "yes" if mean > half else "no" if mean < -half else "not shown"
        found.append(
            {
                "claim": claim,
                "n": len(gaps),
                "here": f"{mine}: {_share(scored[mine][measure])}",
                "beside": f"{other}: {_share(scored[other][measure])}",
                "won": int((gaps > 0).sum()),
                "lost": int((gaps < 0).sum()),
                "better by": f"{mean:+.1f} ± {half:.1f}",
                "holds": holds,
            }
        )
    return found


def judge_time(seconds: Mapping[str, Tensor]) -> list[dict[str, object]]:
    """Whether learned gates cost little time, by the batches that both ways drew in turns."""
    gated, plain = f"prompt{GATED}", "prompt"
    if not {gated, plain} <= seconds.keys():
        return []
    ratios = (seconds[gated] / seconds[plain]).double()
    mean, half = ratios.mean().item(), 1.96 * ratios.std(correction=0).item() / len(ratios) ** 0.5
    holds = "yes" if mean + half < _LITTLE else "no" if mean - half > _LITTLE else "not shown"
    return [
        {
            "claim": f"2509.15357: learned gates cost negligible time (below {_LITTLE:g} times)",
            "n": len(ratios),
            "here": f"{gated}: {mean:.2f} ± {half:.2f}",
            "beside": f"{plain}: 1, batch by batch",
            "won": int((ratios < 1).sum()),
            "lost": int((ratios > 1).sum()),
            "better by": f"{100 * (1 - mean):+.1f} %",
            "holds": holds,
        }
    ]


def _share(hits: Tensor) -> str:
    share = hits.float().mean().item()
    low, high = interval(share, len(hits))
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def measure_regions(config: RegionsConfig) -> None:
    """Write the table and the picture."""
    engine = load_engine(
        model=config.model, device=config.device, saes=[], gate=config.gate, force_gate=config.force_gate
    )
    check_truth(engine, "regions themselves work with any model on PyTorch")
    scenes = TwoThings.draw(engine, config.scenes, config.seed)
    methods = {name: (said, False) for name, said in scenes.methods().items()}
    if config.gate is not None:
        methods |= {name + GATED: (said, True) for name, (said, _) in methods.items()}
    if unknown := set(config.methods) - methods.keys():
        raise ValueError(f"methods: no {', '.join(sorted(unknown))}; there are {'; '.join(methods)}")
    methods = {name: method for name, method in methods.items() if name in (config.methods or methods)}
    drawn = draw_in_turns(engine, methods, scenes, config.batch)
    first = next(iter(drawn.values())).seconds.sum()
    scored = {name: score(scenes, thumbnails(one.latents)) for name, one in drawn.items()}
    rows = [
        {"heard": name, "n": len(one.latents), **shares(scored[name]), "time": f"{one.seconds.sum() / first:.2f}"}
        for name, one in drawn.items()
    ]
    claims = judge_claims(scored) + judge_time({name: one.seconds for name, one in drawn.items()})
    write_table(config.out / "regions", rows)
    write_table(config.out / "claims", claims)
    page = config.out.parent / f"{config.out.name}.md"
    fill(page, "regions", markdown_table(rows))
    fill(page, "claims", markdown_table(claims))
    examples = {name: one.latents[: config.examples] for name, one in drawn.items()}
    show(config.out / "regions.png", engine, scenes, examples)
    config.tell(f"{markdown_table(rows)}\n{markdown_table(claims)}", out=config.out, rows=rows, claims=claims)


def show(path: Path, engine: Engine, scenes: TwoThings, drawn: Mapping[str, Tensor]) -> None:
    """The first scenes in every way, latents [n, C, h, w] by the name of how, beside the exact pictures."""
    n = len(next(iter(drawn.values())))
    exact, _ = render(scenes.codes[:n], jitter_from_noise(scenes.noise[:n]), engine.info.default_size[0])
    columns = [*(decode(engine, latents.to(engine.device)) for latents in drawn.values()), exact]
    pictures = ((torch.stack(columns, 1).permute(0, 1, 3, 4, 2) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    labelled_grid(
        path,
        [plain_caption(scene) for scene in scenes.scenes[:n]],
        [*(name.replace(", ", ",\n") for name in drawn), "exact"],
        [list(row) for row in pictures],
    )
