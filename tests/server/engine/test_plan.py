"""The tap's two forms of one edit: what it does to an update, and gain and bias for a graph that takes them."""

from __future__ import annotations

import pytest
import torch

from turbolens_server.engine.plan import BatchPlan, StepTap
from turbolens_server.engine.types import Edit, Job, Unit, WeightedFeature
from turbolens_server.sae.masks import Box, BoxMask

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
