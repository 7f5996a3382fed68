"""Learned region gates in a batch: heard by those who ask, with all else that a request may have, by nobody else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from turbolens_server.engine.batcher import Batcher
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Guidance, Job, Reference, Region
from turbolens_server.gating.gates import GatesNotApplied
from turbolens_server.steering.choice import FeatureChoice
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import Box, BoxMask
from turbolens_server.unet.fused import FusedBlocks
from turbolens_server.unet.torch_unet import TorchUNet

PROMPT = "a big red star left of a small blue ring, night background"
LEFT = BoxMask((Box(0, 0, 0.5, 1),))
CLOSE = 1e-3


def job(seed: int = 7, *, gate: bool = True, **more) -> Job:
    return Job(PROMPT, seed, more.pop("steps", 2), 128, 128, gate=gate, **more)


def apart(one, other) -> float:
    return float(np.abs(one.latents - other.latents).max() / np.abs(other.latents).max())


WITH = {
    "alone": {},
    "edits": {"edits": (Edit("add", (WeightedFeature("up.0.1", 3),), 4.0, mask=LEFT),)},
    "closed edits": {"edits": (Edit("scale", (WeightedFeature("up.0.1", 3),), 0.0),)},
    "features": {"saes": ("mid.0", "up.0.1")},
    "regions": {"regions": (Region(LEFT, "a big green square"),)},
    "guidance": {"guidance": Guidance(3.0, 0.5, "snow background")},
    "a reference": {
        "references": (Reference("r", "a blue ring", 1),),
        "edits": (Edit("patch", (), 1.0, points=("up.0.0",), reference="r"),),
    },
}


@pytest.mark.parametrize("more", WITH.values(), ids=WITH)
def test_gates_change_what_is_drawn_and_nothing_where_they_are_off(engine, gated_engine, more):
    (gated,), (off,) = gated_engine.run([job(**more)]), gated_engine.run([job(gate=False, **more)])
    (plain,) = engine.run([job(gate=False, **more)])
    assert apart(gated, off) > 0.05
    assert np.array_equal(off.latents, plain.latents)
    assert np.array_equal(off.picture, plain.picture)


@pytest.mark.parametrize("more", WITH.values(), ids=WITH)
def test_compiled_blocks_hear_through_gates_as_the_modules_do(gated_engine, more):
    unet = gated_engine.components.unet
    runner = TorchUNet(unet, FusedBlocks(unet, backend="eager"))
    fused = Engine(gated_engine.components, runner, gated_engine.info, gated_engine.device)
    (ours,), (theirs,) = fused.run([job(**more)]), gated_engine.run([job(**more)])
    assert apart(ours, theirs) < CLOSE


def test_mates_keep_every_bit(gated_engine):
    mate = job(3, saes=("up.0.1",))
    others = [job(), job(9, edits=WITH["edits"]["edits"]), job(4, saes=("mid.0",))]
    found = [gated_engine.run([other, mate])[1] for other in others]
    for one in found[1:]:
        assert np.array_equal(found[0].latents, one.latents)
        assert np.array_equal(found[0].picture, one.picture)
        for a, b in zip(found[0].features, one.features, strict=True):
            assert np.array_equal(a.values, b.values)


def test_jobs_run_with_those_that_hear_as_they_do(gated_engine):
    batcher = Batcher(max_batch=8, wait_s=0)
    batcher.add("a", [job(), job(gate=False), job(3), job(4, gate=False)])
    assert [[slot.index for slot in batcher.take()] for _ in range(2)] == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="gates"):
        gated_engine.run([job(), job(gate=False)])


def test_without_gates_they_are_refused(engine):
    with pytest.raises(ValueError, match="no learned region gates are served"):
        engine.run([job()])


def test_a_backend_that_goes_by_the_gates_is_found_out(gated_engine):
    class Deaf(TorchUNet):
        def predict(self, sample, timestep, conditions, tap):
            return super().predict(sample, timestep, dataclasses.replace(conditions, gating=None), tap)

    deaf = Engine(gated_engine.components, Deaf(gated_engine.components.unet), gated_engine.info, gated_engine.device)
    with pytest.raises(GatesNotApplied, match=r"of 1 passes .*'down.2.0.attn2.0': 0"):
        deaf.run([job()])


def test_runs_that_features_are_chosen_by_hear_as_the_picture_does(gated_engine):
    choice = FeatureChoice(0, 4, ("up.0.1",), False, None)
    edit = Edit("transfer", (), 1.0, unit=Unit.REFERENCE, reference="r", choice=choice)
    given = {"edits": (edit,), "references": (Reference("/own", PROMPT, 7), Reference("r", "a blue ring", 1))}
    gated, plain = (gated_engine.run([job(gate=gate, steps=1, **given)])[0].chosen[0] for gate in (True, False))
    assert gated.given != plain.given
