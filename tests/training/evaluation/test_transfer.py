from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.sae.sae import Sae
from turbolens_training.evaluation.interventions import decode_codes
from turbolens_training.evaluation.transfer import (
    EncodedRun,
    choose_features,
    choose_random_active,
    dense_deltas,
    normalized_mean_difference,
    transfer_deltas,
)

STEPS, PICTURES, POSITIONS, D_MODEL, D_SAE, K = 2, 3, 6, 5, 12, 3
BLOCKS = ("mid.0", "up.0.0")


def random_sae(seed: int) -> Sae:
    g = torch.Generator().manual_seed(seed)
    encoder, rows = torch.randn(D_MODEL, D_SAE, generator=g), torch.randn(D_SAE, D_MODEL, generator=g)
    weights = SaeWeights(encoder, torch.randn(D_SAE, generator=g), rows, torch.randn(D_MODEL, generator=g))
    return Sae(Bundle("x", "mid.0", "topk", K, weights, None, "", None, {}), torch.device("cpu"))


def random_runs(seed: int, *, masked: bool) -> tuple[dict[str, Sae], EncodedRun, EncodedRun]:
    g = torch.Generator().manual_seed(seed)
    saes = {block: random_sae(seed + i) for i, block in enumerate(BLOCKS)}

    def run() -> EncodedRun:
        updates = {block: torch.randn(STEPS, PICTURES, POSITIONS, D_MODEL, generator=g) for block in BLOCKS}
        masks = {block: torch.rand(PICTURES, POSITIONS, generator=g) for block in BLOCKS} if masked else None
        return EncodedRun.of(saes, updates, masks)

    return saes, run(), run()


def dense(run: EncodedRun, block: str) -> torch.Tensor:
    """Activations written out, [T, N, P, d_sae]."""
    codes = run.codes[block]
    return torch.zeros(*codes.values.shape[:-1], D_SAE).scatter(-1, codes.indices, codes.values)


def slow_scores(reference: EncodedRun, base: EncodedRun, picture: int) -> list[float]:
    """The definition, picture by picture and feature by feature."""

    def means(run: EncodedRun) -> list[float]:
        found = []
        for block in BLOCKS:
            z, m = dense(run, block)[0, picture], run.masks[block][picture]
            found += [sum(float(m[p] * z[p, j]) for p in range(POSITIONS)) / float(m.sum()) for j in range(D_SAE)]
        return found

    ours, theirs = means(reference), means(base)
    return [a / sum(ours) - b / sum(theirs) for a, b in zip(ours, theirs, strict=True)]


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), n=st.integers(1, D_SAE), multiplier=st.floats(-2, 2), masked=st.booleans())
def test_transfer_is_its_slow_twin(seed: int, n: int, multiplier: float, masked: bool) -> None:
    saes, reference, base = random_runs(seed, masked=masked)
    scores = normalized_mean_difference(saes, reference, base)
    for picture in range(PICTURES):
        assert scores[picture].tolist() == pytest.approx(slow_scores(reference, base, picture), abs=1e-5)
    choice = choose_features(scores, n)
    deltas = transfer_deltas(saes, reference, base, choice, multiplier)
    for picture in range(PICTURES):
        order = sorted(range(2 * D_SAE), key=lambda j: -float(scores[picture, j]))
        given_, taken = order[:n], order[-n:]
        if len(set(scores[picture].tolist())) == 2 * D_SAE:  # no ties: the sets are unique
            assert choice.given[picture].nonzero()[:, 0].tolist() == sorted(given_)
            assert choice.taken[picture].nonzero()[:, 0].tolist() == sorted(taken)
        given_, taken = (s[picture].nonzero()[:, 0].tolist() for s in (choice.given, choice.taken))
        for index, (block, sae) in enumerate(saes.items()):
            expected = torch.zeros(STEPS, POSITIONS, D_MODEL)
            for step in range(STEPS):
                for p in range(POSITIONS):
                    for j in range(D_SAE):
                        if index * D_SAE + j in given_:
                            z = dense(reference, block)[step, picture, p, j] * reference.masks[block][picture, p]
                            expected[step, p] += multiplier * z * sae.W_dec[j]
                        if index * D_SAE + j in taken:
                            z = dense(base, block)[step, picture, p, j] * base.masks[block][picture, p]
                            expected[step, p] -= multiplier * z * sae.W_dec[j]
            assert torch.allclose(deltas[block][:, picture], expected, atol=1e-4)


def test_all_active_features_transfer_the_whole_reconstruction() -> None:
    saes, reference, base = random_runs(0, masked=False)
    everything = choose_random_active(saes, reference, base, 2 * D_SAE, torch.Generator())
    for block, delta in transfer_deltas(saes, reference, base, everything, 1.0).items():
        whole = decode_codes(saes[block], reference.codes[block]) - decode_codes(saes[block], base.codes[block])
        assert torch.allclose(delta[0], whole[0], atol=1e-5)  # later steps have features that the first one lacks


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
    saes, reference, base = random_runs(2, masked=False)
    half = {block: torch.tensor([1.0, 0, 1, 0, 1, 0]).expand(PICTURES, -1) for block in BLOCKS}
    reference, base = (EncodedRun(run.updates, run.codes, half) for run in (reference, base))
    choice = choose_features(normalized_mean_difference(saes, reference, base), 6)
    for deltas in (transfer_deltas(saes, reference, base, choice, 1.0), dense_deltas(reference, base, 1.0)):
        for delta in deltas.values():
            assert (delta[:, :, 1::2] == 0).all()
            assert (delta[:, :, ::2] != 0).any()


def test_the_dense_difference_turns_the_base_into_the_reference() -> None:
    _, reference, base = random_runs(3, masked=False)
    for block, delta in dense_deltas(reference, base, 1.0).items():
        assert torch.allclose(base.updates[block] + delta, reference.updates[block], atol=1e-6)


@pytest.mark.parametrize("n", [0, -1, D_SAE + 1])
def test_numbers_of_features_out_of_range_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"features={n}: allowed are 1 to {D_SAE}"):
        choose_features(torch.zeros(1, 2 * D_SAE), n)
