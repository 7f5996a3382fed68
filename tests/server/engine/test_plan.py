"""The tap's two forms of one edit: what it does to an update, and gain and bias for a graph that takes them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.engine.info import SaeInfo
from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.plan import BatchPlan
from turbolens_server.engine.tap import StepTap
from turbolens_server.engine.types import Job, SaeOptions
from turbolens_server.sae.bundle import Bundle, Nesting, SaeWeights
from turbolens_server.sae.sae import Sae
from turbolens_server.sae.twin import encode_dense, steer_dense
from turbolens_server.steering.edits import Condition, Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import Box, BoxMask
from turbolens_server.steering.resolve import ResolvedCondition, ResolvedEdit
from turbolens_server.steering.twin import move_dense

GRID = (8, 8)
LEFT = BoxMask((Box(0, 0, 0.5, 1),))


def edit(kind, amount, *features, **more):
    return Edit(kind, tuple(WeightedFeature("mid.0", index) for index in features), amount, Unit.RAW, **more)


def tap_of(engine, *edits, step=0) -> StepTap:
    size = engine.info.default_size
    jobs = [Job("a red star", 7, 2, *size, edits=row, saes=("up.0.0",)) for row in edits]
    return StepTap(BatchPlan(jobs, Lanes.of(jobs), engine.info, engine.saes, torch.device("cpu"), [999.0, 499.0]), step)


def test_gain_and_bias_do_what_the_tap_does(engine):
    rows = (
        (edit("add", 3.0, 1, 5, mask=LEFT), edit("add", -1.0, 5)),
        (),
        (edit("add", 2.0, 9), edit("replace", 4.0, 3, mask=LEFT)),
    )
    tap = tap_of(engine, *rows)
    assert tap.at == {"mid.0", "up.0.0"}
    assert tap.closed == frozenset()
    update = torch.randn(3, 64, 128)
    gain, bias = tap.affine("mid.0", GRID)
    assert (gain.shape, bias.shape) == ((3, 1, *GRID), (3, 128, *GRID))
    steered = gain * update.transpose(1, 2).unflatten(2, GRID) + bias
    assert torch.allclose(steered.flatten(2).transpose(1, 2), tap("mid.0", update, GRID), atol=1e-5)
    assert torch.equal(gain[1], torch.ones(1, *GRID))
    assert not bias[1].any()
    assert (gain[2, 0, :, :4] == 0).all()
    assert tap.affine("up.0.0", GRID) is None, "it is only read"


@pytest.mark.parametrize("kind", ["scale", "set"])
def test_a_point_is_closed_in_the_steps_of_an_edit_that_needs_activations(engine, kind):
    rows = ((edit("add", 1.0, 1),), (edit(kind, 0.0, 2, steps=(1, 2)),))
    assert tap_of(engine, *rows, step=0).closed == frozenset()
    assert tap_of(engine, *rows, step=1).closed == {"mid.0"}


def test_reading_alone_collects_what_the_tap_collects(engine):
    update = torch.randn(2, 64, 128)
    read, called = tap_of(engine, (), ()), tap_of(engine, (), ())
    read.read("up.0.0", update, GRID)
    assert torch.equal(called("up.0.0", update, GRID), update)
    for (row, ours), (other, theirs) in zip(read.collect(), called.collect(), strict=True):
        assert (row, ours.sae, ours.values.tolist()) == (other, theirs.sae, theirs.values.tolist())


D_SAE, PREFIXES, K_MAX = 48, (16, 32, 48), 6


@pytest.fixture(scope="module")
def nested(engine) -> tuple[Bundle, object]:
    """A random Matryoshka at `mid.0`, and what an engine tells that serves it alone."""
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, 128, generator=generator), dim=1)
    weights = SaeWeights(W_dec.T.contiguous(), torch.zeros(D_SAE), W_dec, torch.randn(128, generator=generator))
    bundle = Bundle(
        "mid.0", "mid.0", "turbolens-matryoshka", 4, weights, None, "", None, {}, nesting=Nesting(K_MAX, PREFIXES)
    )
    return bundle, dataclasses.replace(engine.info, saes={"mid.0": SaeInfo("mid.0", "mid.0", bundle, forced=False)})


choices = st.tuples(st.none() | st.integers(1, K_MAX), st.none() | st.sampled_from(PREFIXES))


@given(rows=st.lists(choices, min_size=1, max_size=4), seed=st.integers(0, 99), wanted=st.booleans())
def test_each_row_of_a_batch_is_read_at_the_k_and_prefix_it_asks_for(nested, rows, seed, wanted):
    bundle, info = nested
    update = torch.randn(len(rows), 64, 128, generator=torch.Generator().manual_seed(seed))
    edits = (edit("scale", 0.5, *range(16)), edit("set", 2.0, 3, mask=LEFT))
    jobs = [
        Job(
            "a red star", 7, 1, *info.default_size, edits=edits, saes=("mid.0",) if wanted else (),
            sae_options=(SaeOptions("mid.0", k, prefix),) if (k, prefix) != (None, None) else (),
        )
        for k, prefix in rows
    ]  # fmt: skip
    cpu = torch.device("cpu")
    plan = BatchPlan(jobs, Lanes.of(jobs), info, {"mid.0": Sae(bundle, cpu)}, cpu, [999.0])
    tap = StepTap(plan, 0)
    steered = tap("mid.0", update, GRID)
    for row, (k, prefix) in enumerate(rows):
        expected = steer_dense(bundle, update[row], [as_one_dictionary(e, {"mid.0": 0}) for e in edits], k, prefix)
        assert torch.allclose(steered[row], expected, atol=1e-4)
    found = dict(tap.collect())
    assert list(found) == (list(range(len(rows))) if wanted else [])
    for row, codes in found.items():
        dense = np.zeros((64, D_SAE), np.float32)
        dense[np.repeat(np.arange(64), codes.counts), codes.indices] = codes.values
        assert codes.d_sae == D_SAE
        assert np.allclose(dense, encode_dense(bundle, update[row], *rows[row]).numpy(), atol=1e-4)


AT = "mid.0"


@pytest.fixture(scope="module")
def two_saes(engine):
    """Two random SAEs of unlike sizes at one hook point: what an engine tells that serves them, and themselves."""
    saes = {}
    for seed, (name, d_sae, k) in enumerate([("a", 24, 3), ("b", 40, 5)]):
        generator = torch.Generator().manual_seed(seed)
        W_dec = torch.nn.functional.normalize(torch.randn(d_sae, 128, generator=generator), dim=1)
        weights = SaeWeights(W_dec.T.contiguous(), torch.zeros(d_sae), W_dec, torch.randn(128, generator=generator))
        saes[name] = SaeInfo(name, AT, Bundle(name, AT, "topk", k, weights, None, "", None, {}), forced=False)
    info = dataclasses.replace(engine.info, saes=saes)
    return info, {name: Sae(sae.bundle, torch.device("cpu")) for name, sae in saes.items()}


@st.composite
def edits_of_two_saes(draw):
    """Up to five edits, each of features of one or both; those that replace each have a stripe of their own."""
    features = st.tuples(st.sampled_from("ab"), st.integers(0, 23), st.sampled_from([1.0, -0.5]))
    edits = []
    for number in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["add", "scale", "set", "replace"]))
        named = draw(st.lists(features, min_size=1, max_size=4, unique_by=lambda feature: feature[:2]))
        stripe = BoxMask((Box(number / 5, 0, (number + 1) / 5, 1),))
        mask = stripe if kind == "replace" else draw(st.sampled_from([None, LEFT]))
        amount = draw(st.sampled_from([-2.0, 0.0, 0.5, 3.0]))
        weighted = tuple(WeightedFeature(sae, i, 1.0 if kind == "scale" else weight) for sae, i, weight in named)
        edits.append(Edit(kind, weighted, amount, Unit.RAW, mask))
    return tuple(edits)


def as_one_dictionary(edit: Edit, offset: dict[str, int]) -> ResolvedEdit:
    mask = torch.ones(64) if edit.mask is None else torch.from_numpy(edit.mask.on_grid(*GRID)).flatten()
    features = torch.tensor([offset[feature.sae] + feature.index for feature in edit.features])
    amounts = torch.tensor([edit.amount * feature.weight for feature in edit.features])
    return ResolvedEdit(edit.kind, features, amounts, mask)


@given(st.lists(edits_of_two_saes(), min_size=1, max_size=3), st.sampled_from(["b", "a", "ab", ""]))
def test_two_saes_of_one_hook_point_are_steered_as_one_dictionary(two_saes, rows, wanted):
    info, saes = two_saes
    jobs = [Job("", 7, 1, *info.default_size, edits=edits, saes=tuple(wanted)) for edits in rows]
    plan = BatchPlan(jobs, Lanes.of(jobs), info, saes, torch.device("cpu"), [999.0])
    update = torch.randn(len(rows), 64, 128, generator=torch.Generator().manual_seed(len(rows)))
    tap = StepTap(plan, 0)
    steered = tap(AT, update, GRID)

    bundles = [sae.bundle for sae in info.saes.values()]
    W_dec = torch.cat([bundle.weights.W_dec for bundle in bundles])
    for row, edits in enumerate(rows):
        z = torch.cat([encode_dense(bundle, update[row]) for bundle in bundles], dim=1)
        expected = move_dense(update[row], z, W_dec, [as_one_dictionary(edit, {"a": 0, "b": 24}) for edit in edits])
        assert torch.allclose(steered[row], expected, atol=1e-4)
    if not tap.closed and (affine := tap.affine(AT, GRID)):
        gain, bias = (part.flatten(2).transpose(1, 2) for part in affine)
        assert torch.allclose(gain * update + bias, steered, atol=1e-4)


@pytest.mark.parametrize("rule", ["above", "below", "map"])
@pytest.mark.parametrize("kind", ["add", "scale", "set", "replace"])
def test_an_edit_acts_where_a_feature_of_another_sae_says_and_its_mates_keep_every_bit(two_saes, kind, rule):
    info, saes = two_saes
    update = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(3))
    a, b = (info.saes[name].bundle for name in "ab")
    asked = int(encode_dense(b, update[1]).sum(0).argmax())
    condition = Condition(WeightedFeature("b", asked), rule, 2.0, Unit.RAW)
    feature = (WeightedFeature("a", 3),)
    mate = (Edit("scale", (WeightedFeature("b", 5),), 3.0, Unit.RAW),)
    steer = (Edit("add", feature, 1.0, Unit.RAW, LEFT), Edit(kind, feature, 3.0, Unit.RAW, condition=condition))

    def run(*rows):
        jobs = [Job("", 7, 1, *info.default_size, edits=edits) for edits in rows]
        tap = StepTap(BatchPlan(jobs, Lanes.of(jobs), info, saes, torch.device("cpu"), [999.0]), 0)
        assert tap.closed == {AT}
        return tap(AT, update, GRID)

    steered = run(mate, steer, ())
    z = torch.cat([encode_dense(bundle, update[1]) for bundle in (a, b)], dim=1)
    resolved = [as_one_dictionary(edit, {"a": 0, "b": 24}) for edit in steer]
    resolved[1] = dataclasses.replace(resolved[1], condition=ResolvedCondition(24 + asked, rule, 2.0))
    W_dec = torch.cat([bundle.weights.W_dec for bundle in (a, b)])
    assert torch.allclose(steered[1], move_dense(update[1], z, W_dec, resolved), atol=1e-4)
    some = (steered[1] - run(mate, (*steer[:1], Edit("scale", feature, 1.0, Unit.RAW)), ())[1]).abs().amax(-1) > 1e-3
    assert some.any(), "it acts"
    assert not some.all(), "and not everywhere"
    alone = run(mate, (), ())
    assert torch.equal(steered[[0, 2]], alone[[0, 2]])


def test_swapping_the_order_of_two_edits_of_two_saes_changes_nothing_where_one_replaces(two_saes):
    info, saes = two_saes
    update = torch.randn(1, 64, 128)
    add = Edit("add", (WeightedFeature("a", 3),), 2.0, Unit.RAW)
    replace = Edit("replace", (WeightedFeature("b", 5),), 4.0, Unit.RAW)
    found = []
    for edits in ((add, replace), (replace, add)):
        jobs = [Job("", 7, 1, *info.default_size, edits=edits)]
        plan = BatchPlan(jobs, Lanes.of(jobs), info, saes, torch.device("cpu"), [999.0])
        found.append(StepTap(plan, 0)(AT, update, GRID))
    directions = {name: sae.W_dec for name, sae in saes.items()}
    expected = (2 * directions["a"][3] + 4 * directions["b"][5]).expand(1, 64, 128)
    assert torch.allclose(found[0], expected, atol=1e-5)
    assert torch.equal(*found)
