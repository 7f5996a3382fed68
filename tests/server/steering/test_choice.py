"""The choice of a transfer: as its slow twin, and what must hold of it whatever the runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolens_server.engine.choosing import OWN, choose
from turbolens_server.engine.types import Job, Reference, SparseCodes
from turbolens_server.steering.choice import FeatureChoice, choose_features, normalized_mean_difference
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import GridMask
from turbolens_server.steering.twin import choose_dense

STEPS, EDGE, D_SAE = 3, 2, 7
SAES = ("one", "two")


@dataclasses.dataclass
class Bundle:
    d_sae: int = D_SAE


@dataclasses.dataclass
class Served:
    bundle: Bundle


@dataclasses.dataclass
class Info:
    saes: dict[str, Served]


INFO = Info({name: Served(Bundle()) for name in SAES})


def activations(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """By SAE [T, P, d_sae], mostly zero."""
    shape = (STEPS, EDGE**2, D_SAE)
    return {name: (rng.exponential(size=shape) * (rng.random(shape) < 0.4)).astype(np.float32) for name in SAES}


def sparse(z: dict[str, np.ndarray], steps: int) -> list[SparseCodes]:
    found = []
    for step in range(steps):
        for name in SAES:
            position, index = z[name][step].nonzero()
            counts = np.bincount(position, minlength=EDGE**2).astype(np.uint16)
            values = z[name][step][position, index]
            found.append(SparseCodes(name, step, EDGE, EDGE, D_SAE, counts, index.astype(np.int32), values))
    return found


def grid_mask(weights: np.ndarray) -> GridMask:
    return GridMask({(EDGE, EDGE): weights.reshape(EDGE, EDGE)})


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 3 * D_SAE), all_steps=st.booleans(), masked=st.booleans())
def test_a_job_is_given_what_the_slow_twin_chooses(seed: int, n: int, all_steps: bool, masked: bool) -> None:
    rng = np.random.default_rng(seed)
    other, own = activations(rng), activations(rng)
    weights = [rng.random(EDGE**2).astype(np.float32) if masked else np.ones(EDGE**2, np.float32) for _ in range(2)]
    masks = [grid_mask(w) if masked else None for w in weights]
    choice = FeatureChoice(5, n, SAES, all_steps, masks[1])
    edit = Edit("transfer", (), 1.5, mask=masks[0], reference="other", choice=choice)
    named = Edit("add", (WeightedFeature("one", 0),))
    references = (Reference("other", "b", 2), Reference(OWN, "a", 1))
    job = Job("a", 1, STEPS, 8, 8, edits=(named, edit), references=references)
    asked = []

    def read(jobs, steps):
        asked.append(steps)
        assert all(not one.edits and not one.references for one in jobs)
        return [sparse({"a": own, "b": other}[one.prompt], steps) for one in jobs]

    found, (chosen,) = choose(job, INFO, read)
    over = slice(None) if all_steps else slice(1)
    runs = [[torch.from_numpy(z[name][over]) for name in SAES] for z in (other, own)]
    grids = [[torch.from_numpy(w)] * 2 for w in weights]
    given_, taken = choose_dense(*runs, *grids, n)
    assert asked == [STEPS if all_steps else 1]
    for side, expected in ((chosen.given, given_), (chosen.taken, taken)):
        assert [f.score for f in side] == pytest.approx([score for _, score in expected], abs=1e-5)
        scores = [round(score, 5) for _, score in expected]
        if len(set(scores)) == len(scores):  # without ties the features are these and no others
            assert [SAES.index(f.sae) * D_SAE + f.index for f in side] == [place for place, _ in expected]
    assert chosen.edit == 5
    assert found.edits[0] is named
    parts = {edit.reference: edit for edit in found.edits[1:]}
    for run, amount, mask, side in (("other", 1.5, masks[0], chosen.given), (OWN, -1.5, masks[1], chosen.taken)):
        if side:
            part = parts[run]
            assert (part.kind, part.unit, part.amount, part.mask) == ("add", Unit.REFERENCE, amount, mask)
            assert [(f.sae, f.index, f.weight) for f in part.features] == [(f.sae, f.index, 1.0) for f in side]


def means(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two runs; no two features score the same."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(2, 20, generator=g) * (torch.rand(2, 20, generator=g) < 0.7) for _ in range(2))
    return a + 1e-3 * torch.rand(2, 20, generator=g), b + 1e-3 * torch.rand(2, 20, generator=g)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 30))
def test_what_is_given_one_way_is_taken_the_other_way(seed: int, n: int) -> None:
    reference, own = means(seed)
    there, back = (choose_features(normalized_mean_difference(*m), n) for m in ((reference, own), (own, reference)))
    assert torch.equal(there.given, back.taken)
    assert torch.equal(there.taken, back.given)
    assert not (there.given & there.taken).any()
    assert (there.given.sum(1) <= n).all()


@given(seed=st.integers(0, 2**31), n=st.integers(1, 29), scale=st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_more_features_hold_the_fewer_and_the_size_of_a_run_does_not_count(seed: int, n: int, scale: float) -> None:
    reference, own = means(seed)
    scores = normalized_mean_difference(reference, own)
    assert torch.equal(scores, normalized_mean_difference(scale * reference, own))  # powers of two lose no bit
    fewer, more = choose_features(scores, n), choose_features(scores, n + 1)
    assert not (fewer.given & ~more.given).any()
    assert not (fewer.taken & ~more.taken).any()


@given(seed=st.integers(0, 2**31))
def test_a_run_held_to_itself_has_nothing_to_choose(seed: int) -> None:
    reference, _ = means(seed)
    sides = choose_features(normalized_mean_difference(reference, reference), 5)
    assert not sides.given.any()
    assert not sides.taken.any()
