"""The steering algebra against its slow twin, and its laws."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.kernels import ops
from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.sae.sae import Codes, Sae
from turbolens_server.sae.twin import encode_dense
from turbolens_server.steering.compose import compose, pack
from turbolens_server.steering.kinds import KINDS
from turbolens_server.steering.resolve import ResolvedCondition, ResolvedEdit
from turbolens_server.steering.twin import move_dense

POSITIONS, D_MODEL, D_SAE = 6, 16, 40


def make_bundle(seed: int, architecture: str = "topk") -> Bundle:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=-1)
    weights = SaeWeights(
        W_enc=W_dec.T.contiguous(),
        b_enc=0.1 * torch.randn(D_SAE, generator=generator),
        W_dec=W_dec,
        b_dec=torch.randn(D_MODEL, generator=generator),
        threshold=torch.rand(D_SAE, generator=generator) if architecture == "jumprelu" else None,
    )
    k = 5 if architecture == "topk" else None
    return Bundle("x", "mid.0", architecture, k, weights, None, "", None, {})


def steer(x, edits, W_dec, codes=None, references=None):
    """Steer one picture's update [P, d] as the server does; references: name -> (update, codes)."""
    row = compose(edits, POSITIONS)
    if row.conditional:
        row = row.decided(codes.of(row.asked).T)
    of = {name: known.of(row.features).T for name, (_, known) in (references or {}).items()}
    patches = row.patches
    packed = pack([row.filled(of)], POSITIONS)
    empty = Codes(torch.zeros(POSITIONS, 0), torch.zeros(POSITIONS, 0, dtype=torch.int64))
    values, indices = codes if row.reads_own else empty
    out = ops.apply_edits(
        x[None], packed.gain, packed.offsets, packed.features, packed.slope, packed.shift, W_dec,
        values[None], indices[None],
    )[0]  # fmt: skip
    for name, share in patches.items():
        out = out + share[:, None] * references[name][0]
    return out


amounts = st.floats(-20, 20, width=32)
RUNS = ("one", "two")
conditions = st.builds(
    ResolvedCondition,
    st.integers(0, D_SAE - 1),
    st.sampled_from(["above", "below", "map"]),
    st.sampled_from([0.3, 1.5, 4.0]),
)


@st.composite
def edit_lists(draw):
    """Up to six edits; masks that act on the whole update share the positions out, so that they do not overlap."""
    owner = draw(st.lists(st.integers(0, 2), min_size=POSITIONS, max_size=POSITIONS))
    edits = []
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(list(KINDS)))
        features = draw(st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=4, unique=True))
        if not KINDS[kind].features:
            features = []
        mask = draw(st.lists(st.floats(0, 1, width=32), min_size=POSITIONS, max_size=POSITIONS))
        if KINDS[kind].whole:
            turn = sum(KINDS[edit.kind].whole for edit in edits)
            mask = [m if owner[p] == turn else 0.0 for p, m in enumerate(mask)]
        values = draw(st.lists(amounts, min_size=len(features), max_size=len(features)))
        reads = KINDS[kind].reference or (kind in ("add", "set") and draw(st.booleans()))
        edits.append(
            ResolvedEdit(
                kind, torch.tensor(features, dtype=torch.int64), torch.tensor(values, dtype=torch.float32),
                torch.tensor(mask), draw(st.sampled_from(RUNS)) if reads else None, draw(st.none() | conditions),
            )
        )  # fmt: skip
    return edits


@given(edit_lists(), st.integers(0, 50), st.sampled_from(["topk", "jumprelu"]))
def test_steer_equals_the_slow_twin(edits, seed, architecture):
    """Every kind, in any order, with what it reads of two reference runs."""
    bundle = make_bundle(seed, architecture)
    sae = Sae(bundle, torch.device("cpu"))
    x, *others = 3 * torch.randn(3, POSITIONS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    runs = {name: (update, sae.encode(update)) for name, update in zip(RUNS, others, strict=True)}
    dense = {name: (update, encode_dense(bundle, update)) for name, update in zip(RUNS, others, strict=True)}
    expected = move_dense(x, encode_dense(bundle, x), sae.W_dec, edits, dense)
    scale = max(1.0, float(expected.abs().max()))
    assert torch.allclose(steer(x, edits, sae.W_dec, sae.encode(x), runs) / scale, expected / scale, atol=2e-5)


@given(edit_lists())
def test_what_is_known_before_the_pass_is_said(edits):
    reads = {"add": False, "scale": True, "set": True, "replace": False, "transfer": True, "patch": False}
    edits = [edit for edit in edits if edit.kind in reads]
    row = compose(edits, POSITIONS)
    assert row.reads_own == any(reads[edit.kind] or edit.condition for edit in edits)
    assert set(row.references) <= {edit.reference for edit in edits} - {None}
    assert row.closed == (row.reads_own or any(edit.reference for edit in edits))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), seed=st.integers(0, 50))
def test_an_edit_acts_where_its_mask_is_and_in_proportion_to_it(kind, data, seed):
    """Every kind: no bit moves outside of the mask, and half of the mask is half of the way."""
    sae = Sae(make_bundle(seed), torch.device("cpu"))
    x, other = 3 * torch.randn(2, POSITIONS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    features = data.draw(st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=4, unique=True))
    features = features if KINDS[kind].features else []
    values = data.draw(st.lists(amounts, min_size=len(features), max_size=len(features)))
    mask = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=POSITIONS, max_size=POSITIONS)))
    edit = ResolvedEdit(
        kind, torch.tensor(features, dtype=torch.int64), torch.tensor(values), mask,
        "one" if KINDS[kind].reference else None, None,
    )  # fmt: skip
    given_ = (sae.W_dec, sae.encode(x), {"one": (other, sae.encode(other))})
    whole = steer(x, [edit], *given_)
    half = steer(x, [dataclasses.replace(edit, mask=mask / 2)], *given_)
    assert torch.equal(whole[mask == 0], x[mask == 0])
    scale = max(1.0, float(whole.abs().max()))
    assert torch.allclose((half - x) / scale, (whole - x) / 2 / scale, atol=1e-5)


def test_a_transfer_takes_over_the_reference_runs_activations_where_its_mask_is():
    bundle = make_bundle(2)
    sae = Sae(bundle, torch.device("cpu"))
    x, other = torch.randn(2, POSITIONS, D_MODEL)
    z, z_r = encode_dense(bundle, x), encode_dense(bundle, other)
    feature = int(z_r.sum(0).argmax())
    mask = torch.tensor([1.0, 1, 1, 0, 0, 0])
    edit = ResolvedEdit("transfer", torch.tensor([feature]), torch.tensor([2.0]), mask, "one")
    steered = steer(x, [edit], sae.W_dec, sae.encode(x), {"one": (other, sae.encode(other))})
    moved = (mask * (2 * z_r[:, feature] - z[:, feature]))[:, None] * sae.W_dec[feature]
    assert torch.allclose(steered, x + moved, atol=1e-5)
    assert not torch.allclose(steered[:3], x[:3])


def test_a_patch_puts_the_reference_runs_update_in_place_to_the_last_bit():
    x, other = torch.randn(2, POSITIONS, D_MODEL)
    nothing = torch.zeros(0, dtype=torch.int64)
    edit = ResolvedEdit("patch", nothing, nothing.float(), torch.tensor([1.0, 1, 1, 0, 0, 0]), "one")
    empty = Codes(torch.zeros(POSITIONS, 1), torch.zeros(POSITIONS, 1, dtype=torch.int64))
    steered = steer(x, [edit], torch.zeros(0, D_MODEL), None, {"one": (other, empty)})
    assert torch.equal(steered, torch.cat([other[:3], x[3:]]))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_encode_equals_the_slow_twin(architecture):
    bundle = make_bundle(3, architecture)
    x = torch.randn(200, D_MODEL)
    codes = Sae(bundle, torch.device("cpu")).encode(x)
    dense = torch.zeros(200, D_SAE).scatter_add(-1, codes.indices, codes.values)
    assert torch.allclose(dense, encode_dense(bundle, x), atol=1e-5)
    assert (codes.values[:, :-1] >= codes.values[:, 1:]).all()
    if architecture == "topk":
        assert ((dense > 0).sum(-1) <= bundle.k).all()
    assert (dense > 0).any()


def test_codes_of_some_features_are_columns_of_the_dense_ones():
    bundle = make_bundle(4)
    x = torch.randn(50, D_MODEL)
    codes = Sae(bundle, torch.device("cpu")).encode(x)
    some = torch.tensor([0, 7, 39])
    assert torch.allclose(codes.of(some), encode_dense(bundle, x)[:, some], atol=1e-5)


def everywhere(kind: str, features: list[int], values: list[float]) -> ResolvedEdit:
    return ResolvedEdit(kind, torch.tensor(features), torch.tensor(values), torch.ones(POSITIONS))


def test_no_edit_and_neutral_edits_change_no_bit():
    bundle = make_bundle(5)
    sae = Sae(bundle, torch.device("cpu"))
    x = torch.randn(POSITIONS, D_MODEL)
    codes = sae.encode(x)
    active = codes.indices[0, :3].tolist()
    assert torch.equal(steer(x, [], sae.W_dec), x)
    assert torch.equal(steer(x, [everywhere("add", active, [0.0] * 3)], sae.W_dec, None), x)
    assert torch.equal(steer(x, [everywhere("scale", active, [1.0] * 3)], sae.W_dec, codes), x)
    nowhere = dataclasses.replace(everywhere("replace", active, [5.0] * 3), mask=torch.zeros(POSITIONS))
    assert torch.equal(steer(x, [nowhere], sae.W_dec, None), x)


@given(st.floats(-50, 50, width=32), st.floats(-50, 50, width=32))
def test_add_is_linear_in_strength(a, b):
    sae = Sae(make_bundle(6), torch.device("cpu"))
    x = torch.randn(POSITIONS, D_MODEL, generator=torch.Generator().manual_seed(0))

    def moved(strength):
        return steer(x, [everywhere("add", [3, 9], [strength, -strength])], sae.W_dec, None) - x

    assert torch.allclose(moved(a) + moved(b), moved(a + b), atol=1e-4)


@given(edit_lists(), conditions, st.integers(0, 20))
def test_an_edit_is_split_in_two_by_a_condition_and_its_opposite(edits, condition, seed):
    """Whatever is edited before: what acts above and below a threshold together acts everywhere."""
    sae = Sae(make_bundle(seed), torch.device("cpu"))
    x, *others = torch.randn(3, POSITIONS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    runs = {name: (update, sae.encode(update)) for name, update in zip(RUNS, others, strict=True)}
    above, below = (dataclasses.replace(condition, rule=rule) for rule in ("above", "below"))
    last = everywhere("set", [1, 4], [2.0, -1.0])
    split = [dataclasses.replace(last, condition=above), dataclasses.replace(last, condition=below)]
    one = steer(x, [*edits, last], sae.W_dec, sae.encode(x), runs)
    assert torch.allclose(steer(x, [*edits, *split], sae.W_dec, sae.encode(x), runs), one, atol=1e-4)
    never = dataclasses.replace(last, condition=ResolvedCondition(1, "above", 1e6))
    plain = steer(x, edits, sae.W_dec, sae.encode(x), runs)
    assert torch.allclose(steer(x, [*edits, never], sae.W_dec, sae.encode(x), runs), plain, atol=1e-5)


def test_scale_zero_removes_exactly_the_feature():
    bundle = make_bundle(7)
    sae = Sae(bundle, torch.device("cpu"))
    x = torch.randn(POSITIONS, D_MODEL)
    codes = sae.encode(x)
    feature = codes.indices[0, 0]
    steered = steer(x, [everywhere("scale", [int(feature)], [0.0])], sae.W_dec, codes)
    expected = x - codes.of(feature[None]) * sae.W_dec[feature]
    assert torch.allclose(steered, expected, atol=1e-6)
    assert not torch.allclose(steered, x)


def test_half_precision_updates_keep_their_type():
    sae = Sae(make_bundle(8), torch.device("cpu"))
    x = torch.randn(POSITIONS, D_MODEL).half()
    steered = steer(x, [everywhere("add", [1], [2.0])], sae.W_dec, None)
    assert steered.dtype == torch.float16
    assert np.allclose((steered - x).float().numpy(), (2 * sae.W_dec[1]).numpy(), atol=1e-2)
