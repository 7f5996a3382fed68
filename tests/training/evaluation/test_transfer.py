from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolens_server.engine.engine import Engine
from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.sae.sae import Sae
from turbolens_server.sae.twin import encode_dense
from turbolens_server.steering.choice import choose_features, normalized_mean_difference
from turbolens_server.steering.masks import Box, BoxMask
from turbolens_training.evaluation.edits import (
    NOTHING,
    CaptionPairs,
    Material,
    edit_pictures,
    transfer,
    transfer_random,
)
from turbolens_training.evaluation.sampling import saes_by_block, sample
from turbolens_training.evaluation.transfer import (
    EncodedPictures,
    choose_random_active,
    choose_transferred,
    dense_deltas,
    first_means,
)

STEPS, PICTURES, POSITIONS, D_MODEL, D_SAE, K = 2, 3, 6, 5, 12, 3
BLOCKS = ("mid.0", "up.0.0")


def random_sae(seed: int) -> Sae:
    g = torch.Generator().manual_seed(seed)
    encoder, rows = torch.randn(D_MODEL, D_SAE, generator=g), torch.randn(D_SAE, D_MODEL, generator=g)
    weights = SaeWeights(encoder, torch.randn(D_SAE, generator=g), rows, torch.randn(D_MODEL, generator=g))
    return Sae(Bundle("x", "mid.0", "topk", K, weights, None, "", None, {}), torch.device("cpu"))


def random_runs(seed: int, *, masked: bool) -> tuple[dict[str, Sae], EncodedPictures, EncodedPictures]:
    g = torch.Generator().manual_seed(seed)
    saes = {block: random_sae(seed + i) for i, block in enumerate(BLOCKS)}

    def run() -> EncodedPictures:
        updates = {block: torch.randn(STEPS, PICTURES, POSITIONS, D_MODEL, generator=g) for block in BLOCKS}
        masks = {block: torch.rand(PICTURES, POSITIONS, generator=g) for block in BLOCKS} if masked else None
        return EncodedPictures.of(saes, updates, masks)

    return saes, run(), run()


def dense(run: EncodedPictures, block: str) -> torch.Tensor:
    """Activations written out, [T, N, P, d_sae]."""
    codes = run.codes[block]
    return torch.zeros(*codes.values.shape[:-1], D_SAE).scatter(-1, codes.indices, codes.values)


def slow_scores(reference: EncodedPictures, base: EncodedPictures, picture: int) -> list[float]:
    """The definition, picture by picture and feature by feature."""

    def means(run: EncodedPictures) -> list[float]:
        found = []
        for block in BLOCKS:
            z, m = dense(run, block)[0, picture], run.masks[block][picture]
            found += [sum(float(m[p] * z[p, j]) for p in range(POSITIONS)) / float(m.sum()) for j in range(D_SAE)]
        return found

    ours, theirs = means(reference), means(base)
    return [a / sum(ours) - b / sum(theirs) for a, b in zip(ours, theirs, strict=True)]


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 3 * D_SAE), masked=st.booleans())
def test_features_are_chosen_as_the_slow_twin_chooses(seed: int, n: int, masked: bool) -> None:
    saes, reference, base = random_runs(seed, masked=masked)
    scores = normalized_mean_difference(first_means(saes, reference), first_means(saes, base))
    for picture in range(PICTURES):
        assert scores[picture].tolist() == pytest.approx(slow_scores(reference, base, picture), abs=1e-5)
    choice = choose_transferred(saes, reference, base, n)
    for picture in range(PICTURES):
        order = sorted(range(2 * D_SAE), key=lambda j: -float(scores[picture, j]))
        given_ = [j for j in order[:n] if scores[picture, j] > 0]
        taken = [j for j in order[-n:] if scores[picture, j] < 0]
        active = scores[picture][scores[picture] != 0].tolist()
        if len(set(active)) == len(active):  # no ties among those with a score: the sets are unique
            assert choice.given[picture].nonzero()[:, 0].tolist() == sorted(given_)
            assert choice.taken[picture].nonzero()[:, 0].tolist() == sorted(taken)


def test_more_features_than_have_a_score_are_not_filled_up_with_others() -> None:
    choice = choose_features(torch.tensor([[0.3, 0.0, -0.1, 0.0, 0.2, 0.0]]), 5)
    assert choice.given.tolist() == [[True, False, False, False, True, False]]
    assert choice.taken.tolist() == [[False, False, True, False, False, False]]


def test_random_features_are_active_ones_and_no_more_than_asked_for() -> None:
    saes, reference, base = random_runs(1, masked=False)
    choice = choose_random_active(saes, reference, base, 4, torch.Generator().manual_seed(0))
    for chosen, run in ((choice.given, reference), (choice.taken, base)):
        active = torch.cat([(dense(run, block)[0] > 0).any(1) for block in BLOCKS], 1)
        assert (chosen.sum(1) == 4).all()
        assert not (chosen & ~active).any()
    again = choose_random_active(saes, reference, base, 4, torch.Generator().manual_seed(1))
    assert not torch.equal(again.given, choice.given)


def test_masks_hold_edits_back() -> None:
    _, reference, base = random_runs(2, masked=False)
    half = {block: torch.tensor([1.0, 0, 1, 0, 1, 0]).expand(PICTURES, -1) for block in BLOCKS}
    reference, base = (EncodedPictures(run.updates, run.codes, half) for run in (reference, base))
    for delta in dense_deltas(reference, base, 1.0).values():
        assert (delta[:, :, 1::2] == 0).all()
        assert (delta[:, :, ::2] != 0).any()


def test_the_dense_difference_turns_the_base_into_the_reference() -> None:
    _, reference, base = random_runs(3, masked=False)
    for block, delta in dense_deltas(reference, base, 1.0).items():
        assert torch.allclose(base.updates[block] + delta, reference.updates[block], atol=1e-6)


@pytest.mark.parametrize("n", [0, -1])
def test_numbers_of_features_out_of_range_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"features={n}: expected at least 1"):
        choose_features(torch.zeros(1, 2 * D_SAE), n)


LEFT, RIGHT = BoxMask((Box(0, 0, 0.5, 1),)), BoxMask((Box(0.25, 0, 1, 1),))


@pytest.mark.parametrize("masks", [None, [(LEFT, RIGHT), (RIGHT, LEFT)]])
@pytest.mark.parametrize("method", [transfer(3, 1.5), transfer_random(4, -0.5, 7)])
def test_the_server_edits_as_the_definition_says(sae_engine: Engine, masks, method) -> None:
    """Two runs that are kept, and a third with what the definition adds to every update, feature by feature."""
    pairs = CaptionPairs(["a red star", "a big ring"], ["a blue star", "a small ring"], [3, 4], masks)
    saes = saes_by_block(sae_engine)
    found = edit_pictures(sae_engine, saes, pairs, {"it": method}, steps=2, batch=2, title="test")
    base, other = (sample(sae_engine, c, pairs.seeds, 2, keep=True) for c in (pairs.captions, pairs.edited))
    grids = {point.name: point.grid(*sae_engine.info.default_size) for point in sae_engine.info.hook_points}

    def on_grid(which: int, block: str) -> torch.Tensor:
        sides = [mask[which].on_grid(*grids[block]) for mask in masks or []]
        return torch.stack([torch.from_numpy(side).flatten() for side in sides])

    of = [None if masks is None else {block: on_grid(which, block) for block in saes} for which in (0, 1)]
    runs = [EncodedPictures.of(saes, run.updates, own) for run, own in zip((base, other), of, strict=True)]
    steered = method(Material(saes, slice(0, 2), *runs, masks))

    def definition(step: int, block: str, update: torch.Tensor) -> torch.Tensor:
        moved, sae = update.clone(), saes[block]
        for picture, edits in enumerate(steered.edits):
            for edit in edits:
                run = runs[1] if edit.reference == "edited" else runs[0]
                z = encode_dense(sae.bundle, run.updates[block][step, picture]) * run.masks[block][picture][:, None]
                for feature in edit.features:
                    if feature.sae == sae.bundle.name:
                        moved[picture] += edit.amount * z[:, feature.index, None] * sae.W_dec[feature.index]
        return moved

    expected = sample(sae_engine, pairs.captions, pairs.seeds, 2, intervene=definition).latents
    assert torch.allclose(found["it"], expected, atol=1e-4)
    assert not torch.allclose(found["it"], found[NOTHING], atol=1e-3)
    assert {edit.amount for edits in steered.edits for edit in edits} in ({1.5, -1.5}, {0.5, -0.5})
