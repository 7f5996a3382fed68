"""Edits that leave the server the choice of their features, turned into edits that name them.

What is chosen depends on the reference's run and the picture's own, whole and without any edit, over all blocks: so the
two are run before the picture, to the end of the first step or of all. They share no batch with other pictures' runs:
beyond rounding nothing depends on batch mates, and here rounding could tip the choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from turbolens_server.engine.info import EngineInfo
from turbolens_server.engine.types import Job, SparseCodes
from turbolens_server.steering.choice import (
    Chosen,
    FeatureChoice,
    ScoredFeature,
    choose_features,
    mean_activations,
    normalized_mean_difference,
)
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import Mask

OWN: Final = "/own"
"""Name of the picture's own run without any edit, among a choosing job's references; no caller's has a slash."""
Read = Callable[[Sequence[Job], int], Sequence[Sequence[SparseCodes]]]
"""Runs jobs for so many steps: the features of each."""


def choose(job: Job, info: EngineInfo, read: Read) -> tuple[Job, tuple[Chosen, ...]]:
    """A job whose edits name all their features, and what was chosen."""
    open_edits = [edit for edit in job.edits if edit.choice is not None]
    if not open_edits:
        return job, ()
    named = {reference.name: reference for reference in job.references}
    names = sorted({OWN, *(edit.reference or OWN for edit in open_edits)})
    choices = [edit.choice for edit in open_edits if edit.choice is not None]
    saes = tuple(name for name in info.saes if any(name in choice.saes for choice in choices))
    steps = job.steps if any(choice.all_steps for choice in choices) else 1
    runs = [
        dataclasses.replace(
            job, prompt=named[name].prompt, seed=named[name].seed, start=named[name].start, edits=(), references=(),
            saes=saes, picture=False, previews=False, regions=job.regions if name == OWN else (),
            sae_options=tuple(options for options in job.sae_options if options.sae in saes),
        )
        for name in names
    ]  # fmt: skip
    found = dict(zip(names, read(runs, steps), strict=True))
    made: dict[tuple[FeatureChoice, str], Chosen] = {}
    edits: list[Edit] = []
    for edit in job.edits:
        if edit.choice is None or edit.reference is None:
            edits.append(edit)
            continue
        key = (edit.choice, edit.reference)  # edits of single steps share their request's choice
        if key not in made:
            made[key] = _chosen(edit.choice, edit.mask, found[edit.reference], found[OWN], info)
        edits += _named(edit, edit.choice, made[key])
    return dataclasses.replace(job, edits=tuple(edits)), tuple(made.values())


def _chosen(
    choice: FeatureChoice, mask: Mask | None, reference: Sequence[SparseCodes], own: Sequence[SparseCodes],
    info: EngineInfo,
) -> Chosen:  # fmt: skip
    means = [_means(choice, codes, at) for codes, at in ((reference, mask), (own, choice.own_mask))]
    scores = normalized_mean_difference(*means)
    sides = choose_features(scores, choice.features)
    features = [(name, index) for name in choice.saes for index in range(info.saes[name].bundle.d_sae)]

    def listed(some: Tensor, best: float) -> tuple[ScoredFeature, ...]:
        at = sorted(some[0].nonzero()[:, 0].tolist(), key=lambda j: -best * float(scores[0, j]))
        return tuple(ScoredFeature(features[j][0], features[j][1], float(scores[0, j])) for j in at)

    return Chosen(choice.edit, listed(sides.given, 1), listed(sides.taken, -1))


def _means(choice: FeatureChoice, run: Sequence[SparseCodes], mask: Mask | None) -> Tensor:
    """Mean activations of one run, [1, features of all SAEs]: over its first step, or each step counting the same."""
    found = []
    for name in choice.saes:
        steps = [codes for codes in run if codes.sae == name and (choice.all_steps or codes.step == 0)]
        each = [_mean_at(codes, mask) for codes in steps]
        found.append(torch.stack(each).mean(0))
    return torch.cat(found, 1)


def _mean_at(codes: SparseCodes, mask: Mask | None) -> Tensor:
    """Mean activations at one step, [1, d_sae]."""
    grid = (codes.height, codes.width)
    weights = np.ones(grid, np.float32) if mask is None else mask.on_grid(*grid)
    at = np.arange(codes.counts.max(initial=1)) < codes.counts[:, None]  # [P, K]
    values, indices = np.zeros(at.shape, np.float32), np.zeros(at.shape, np.int64)
    values[at], indices[at] = codes.values, codes.indices
    z, features, m = (torch.from_numpy(part)[None] for part in (values, indices, weights.reshape(-1)))
    return mean_activations(z, features, m, codes.d_sae)


def _named(edit: Edit, choice: FeatureChoice, chosen: Chosen) -> list[Edit]:
    """What was published with the choice: the reference's activations on top, the own run's taken off."""
    sides = ((chosen.given, edit.amount, edit.mask, edit.reference), (chosen.taken, -edit.amount, choice.own_mask, OWN))
    return [
        dataclasses.replace(
            edit, kind="add", unit=Unit.REFERENCE, choice=None, amount=amount, mask=mask, reference=run,
            features=tuple(WeightedFeature(feature.sae, feature.index) for feature in side),
        )
        for side, amount, mask, run in sides
        if side
    ]  # fmt: skip
