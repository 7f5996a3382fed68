"""The tap's two forms of one edit: what it does to an update, and gain and bias for a graph that takes them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.engine.engine import SaeInfo
from turbolens_server.engine.plan import BatchPlan, StepTap
from turbolens_server.engine.types import Edit, Job, SaeOptions, Unit, WeightedFeature
from turbolens_server.sae.bundle import Bundle, Nesting, SaeWeights
from turbolens_server.sae.masks import Box, BoxMask
from turbolens_server.sae.reference import encode_dense, steer_dense
from turbolens_server.sae.sae import Sae

GRID = (8, 8)
LEFT = BoxMask((Box(0, 0, 0.5, 1),))


def edit(kind, amount, *features, **more):
    return Edit(kind, tuple(WeightedFeature("mid.0", index) for index in features), amount, Unit.RAW, **more)


def tap_of(engine, *edits, step=0) -> StepTap:
    size = engine.info.default_size
    jobs = [Job("a red star", 7, 2, *size, edits=row, saes=("up.0.0",)) for row in edits]
    return StepTap(BatchPlan(jobs, engine.info, engine.saes, torch.device("cpu"), [999.0, 499.0]), step)


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
    plan = BatchPlan(jobs, info, {"mid.0": Sae(bundle, cpu)}, cpu, [999.0])
    tap = StepTap(plan, 0)
    steered = tap("mid.0", update, GRID)
    for row, (k, prefix) in enumerate(rows):
        expected = steer_dense(bundle, update[row], plan.edits_at("mid.0", 0)[row], k, prefix)
        assert torch.allclose(steered[row], expected, atol=1e-4)
    found = dict(tap.collect())
    assert list(found) == (list(range(len(rows))) if wanted else [])
    for row, codes in found.items():
        dense = np.zeros((64, D_SAE), np.float32)
        dense[np.repeat(np.arange(64), codes.counts), codes.indices] = codes.values
        assert codes.d_sae == D_SAE
        assert np.allclose(dense, encode_dense(bundle, update[row], *rows[row]).numpy(), atol=1e-4)
