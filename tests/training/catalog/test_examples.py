from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.sae.sae import Codes
from turbolens_training.activations.stream import Updates
from turbolens_training.catalog.examples import TopExamples, strongest

D_SAE, GRID, KEEP = 5, (2, 3), 2


@given(
    entries=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=20),
    keep=st.integers(0, 4),
)
def test_the_strongest_of_each_group(entries: list[tuple[int, int]], keep: int) -> None:
    groups = np.array([group for group, _ in entries], np.int64)
    values = np.array([value for _, value in entries], np.float32)
    expected = []
    for group in range(4):
        own = [at for at, entry in enumerate(entries) if entry[0] == group]
        expected += sorted(own, key=lambda at: (-entries[at][1], at))[:keep]
    assert strongest(groups, values, keep).tolist() == expected


def batch(seed: int, first: int, images: int, steps: int) -> tuple[Updates, list[Codes]]:
    generator = torch.Generator().manual_seed(seed)
    codes = []
    for _ in range(steps):
        order = torch.rand(images, 6, D_SAE, generator=generator).argsort(-1)[..., :3]  # features differ in a position
        # Few values, so that there are ties, and zeros, which are no activations.
        values = torch.randint(0, 4, (images, 6, 3), generator=generator).float()
        codes.append(Codes(values, order))
    captions = tuple(f"picture {first + i}" for i in range(images))
    seeds = tuple(range(first, first + images))
    return Updates(captions, seeds, torch.zeros(images), tuple(range(steps)), {}), codes


@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), steps=st.integers(1, 2))
def test_top_examples_are_those_of_a_full_sort(seed: int, sizes: list[int], steps: int) -> None:
    """However the pictures are batched: each picture's strongest place, then the strongest pictures."""
    top, everything = TopExamples(D_SAE, KEEP, GRID), []
    for at, images in enumerate(sizes):
        first = sum(sizes[:at])
        updates, codes = batch(seed + at, first, images, steps)
        top.add(updates, codes)
        for step, found in enumerate(codes):
            for i in range(images):
                for p in range(6):
                    for value, feature in zip(found.values[i, p].tolist(), found.indices[i, p].tolist(), strict=True):
                        everything.append((feature, first + i, value, step, p))
    for feature, examples in enumerate(top.examples()):
        best = {}
        for found_feature, picture, value, step, p in sorted(everything, key=lambda e: (-e[2], e[3], e[4])):
            if found_feature == feature and value > 0:
                best.setdefault(picture, (value, step, p))
        ranked = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))[:KEEP]
        assert [(e.seed, e.activation, e.step, e.y * GRID[1] + e.x) for e in examples] == [
            (picture, value, step, p) for picture, (value, step, p) in ranked
        ]
        assert all(e.prompt == f"picture {e.seed}" and e.steps == steps for e in examples)


def test_none_are_kept_where_none_are_asked_for() -> None:
    top = TopExamples(D_SAE, 0, GRID)
    top.add(*batch(0, 0, 2, 1))
    assert top.examples() == [()] * D_SAE
