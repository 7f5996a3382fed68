"""Edit pictures towards another caption by every method alike: run the two captions, intervene, run again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job, Reference
from turbolens_server.sae.sae import Sae
from turbolens_server.steering.choice import Sides
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import Mask
from turbolens_training.activations.taps import Intervention
from turbolens_training.evaluation.interventions import shift
from turbolens_training.evaluation.kept import KeptBatches
from turbolens_training.evaluation.sampling import Walked, device_of, sample
from turbolens_training.evaluation.transfer import (
    EncodedPictures,
    choose_random_active,
    choose_transferred,
    dense_deltas,
)

NOTHING: Final = "nothing"
"""The floor: the base caption's picture as it is."""
PROMPT: Final = "prompt change"
"""The ceiling: the picture of the edited caption."""
BASE: Final = "base"
"""The run of a picture's own caption, unsteered, beside the steered one."""
EDITED: Final = "edited"
"""The run of its edited caption."""


@dataclasses.dataclass(frozen=True)
class CaptionPairs:
    """Pictures to edit, and what they should become."""

    captions: list[str]
    edited: list[str]
    seeds: list[int]
    """Of both pictures."""
    masks: list[tuple[Mask, Mask]] | None = None
    """For each pair the masks of the caption's and of the edited caption's picture; None: all of both."""

    def __getitem__(self, rows: slice) -> CaptionPairs:
        masks = None if self.masks is None else self.masks[rows]
        return CaptionPairs(self.captions[rows], self.edited[rows], self.seeds[rows], masks)

    def __len__(self) -> int:
        return len(self.captions)


@dataclasses.dataclass(frozen=True)
class Material:
    """What a method may look at: both runs of one batch."""

    saes: Mapping[str, Sae]
    rows: slice
    """Of the batch in all pairs."""
    base: EncodedPictures
    reference: EncodedPictures
    masks: Sequence[tuple[Mask, Mask]] | None = None
    """Of the batch, as in `CaptionPairs`."""


@dataclasses.dataclass(frozen=True)
class Steered:
    """Edits of each picture of a batch, as the server takes them; they may read its runs `BASE` and `EDITED`."""

    edits: tuple[tuple[Edit, ...], ...]


Method = Callable[[Material], Intervention | Steered]


def transfer(n: int, multiplier: float) -> Method:
    """Feature transfer as RIEBench does it; see `turbolens_training.evaluation.transfer`."""

    def method(m: Material) -> Steered:
        return _transfer(m, choose_transferred(m.saes, m.reference, m.base, n), multiplier)

    return method


def transfer_random(n: int, multiplier: float, seed: int) -> Method:
    """The same with random features among the active ones."""

    def method(m: Material) -> Steered:
        generator = torch.Generator().manual_seed(seed + m.rows.start)
        return _transfer(m, choose_random_active(m.saes, m.reference, m.base, n, generator), multiplier)

    return method


def _transfer(m: Material, choice: Sides, multiplier: float) -> Steered:
    """Give the chosen features the activations of the edited caption's run, take away those of the caption's own."""
    names = [WeightedFeature(sae.bundle.name, index) for sae in m.saes.values() for index in range(sae.W_dec.shape[0])]
    edits = []
    for row, (given, taken) in enumerate(zip(choice.given, choice.taken, strict=True)):
        of_base, of_edited = (None, None) if m.masks is None else m.masks[row]
        sides = ((given, multiplier, of_edited, EDITED), (taken, -multiplier, of_base, BASE))
        edits.append(
            tuple(
                Edit("add", tuple(names[j] for j in some.nonzero()[:, 0].tolist()), amount, Unit.REFERENCE, mask,
                     reference=run)
                for some, amount, mask, run in sides
                if some.any()
            )
        )  # fmt: skip
    return Steered(tuple(edits))


def patch(points: Sequence[str]) -> Method:
    """The hook points add what they added in the edited caption's run."""
    edit = Edit("patch", (), reference=EDITED, points=tuple(points))
    return lambda m: Steered(((edit,),) * (m.rows.stop - m.rows.start))


def transfer_dense(multiplier: float) -> Method:
    """The dense difference of both runs' updates, position by position and step by step."""
    return lambda m: shift(dense_deltas(m.reference, m.base, multiplier))


def _grids(engine: Engine, masks: Sequence[Mask]) -> dict[str, Tensor]:
    """Masks on every hook point's grid, [N, P]."""
    grids = {point.name: point.grid(*engine.info.default_size) for point in engine.info.hook_points}
    return {
        block: torch.stack([torch.from_numpy(mask.on_grid(*grid)).flatten() for mask in masks]).to(device_of(engine))
        for block, grid in grids.items()
    }


@torch.inference_mode()
def edit_pictures(
    engine: Engine,
    saes: Mapping[str, Sae],
    pairs: CaptionPairs,
    methods: Mapping[str, Method],
    *,
    steps: int,
    batch: int,
    title: str,
    kept: KeptBatches | None = None,
) -> dict[str, Tensor]:
    """Latents [N, C, h, w] of every method by name, and of `NOTHING` and `PROMPT`, the unedited runs.

    `kept` holds what a run that was cut short has made, and gets what this one makes.
    """
    latents: dict[str, list[Tensor]] = {name: [] for name in (NOTHING, PROMPT, *methods)}
    with tqdm(total=len(pairs) * len(latents), desc=title, unit="picture") as progress:
        for start in range(0, len(pairs), batch):
            rows = slice(start, min(start + batch, len(pairs)))
            some = pairs[rows]
            if kept is not None and (made := kept.get(start)) is not None:
                for name, parts in latents.items():
                    parts.append(made[name])
                progress.update(len(some) * len(latents))
                continue

            def run(captions: list[str], intervene: Intervention | None = None, some: CaptionPairs = some) -> Walked:
                found = sample(engine, captions, some.seeds, steps, intervene=intervene, keep=intervene is None)
                progress.update(len(captions))
                return found

            base, reference = run(some.captions), run(some.edited)
            masks = (None, None) if some.masks is None else (_grids(engine, m) for m in zip(*some.masks, strict=True))
            own, other = (EncodedPictures.of(saes, r.updates, m) for r, m in zip((base, reference), masks, strict=True))
            material = Material(saes, rows, own, other, some.masks)
            latents[NOTHING].append(base.latents.cpu())
            latents[PROMPT].append(reference.latents.cpu())
            for name, method in methods.items():
                do = method(material)
                if isinstance(do, Steered):
                    latents[name].append(_run_steered(engine, some, do, steps))
                    progress.update(len(some))
                else:
                    latents[name].append(run(some.captions, do).latents.cpu())
            if kept is not None:
                kept.put(start, {name: parts[-1] for name, parts in latents.items()})
    return {name: torch.cat(parts) for name, parts in latents.items()}


def _run_steered(engine: Engine, pairs: CaptionPairs, steered: Steered, steps: int) -> Tensor:
    """Latents [N, C, h, w] of edited pictures, each in one batch with the runs that its edits read."""
    jobs = []
    for caption, edited, seed, edits in zip(pairs.captions, pairs.edited, pairs.seeds, steered.edits, strict=True):
        runs = {BASE: Reference(BASE, caption, seed), EDITED: Reference(EDITED, edited, seed)}
        read = tuple(run for name, run in runs.items() if any(edit.reference == name for edit in edits))
        jobs.append(Job(caption, seed, steps, *engine.info.default_size, edits, picture=False, references=read))
    found = [torch.from_numpy(result.latents) for result in engine.run(jobs) if result is not None]
    return torch.stack(found)
