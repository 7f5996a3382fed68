"""The sampler that is written out, held to the one of `diffusers`: every latent, estimate and start, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler as Theirs
from diffusers import EulerDiscreteScheduler

from turbolens_server.engine.ancestral import EulerAncestralDiscreteScheduler as Ours
from turbolens_server.engine.ancestral import Schedule
from turbolens_server.engine.sampler import RowStart, Sampler, check_scheduler
from turbolens_server.loading.hub import embedded_model

CPU = torch.device("cpu")
SDXL_TURBO = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "timestep_spacing": "trailing",
}  # fmt: skip
KINDS = {
    "SDXL Turbo": Theirs(**SDXL_TURBO),
    "mini": Theirs.from_pretrained(embedded_model() / "scheduler"),
    "leading": Theirs(**{**SDXL_TURBO, "timestep_spacing": "leading"}),
    "linspace": Theirs(**{**SDXL_TURBO, "timestep_spacing": "linspace", "prediction_type": "v_prediction"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_value_is_that_of_diffusers(kind, dtype):
    theirs = KINDS[kind]
    ours = Ours.like(theirs, 6)
    for steps in (1, 2, 6):
        for skipped in (0, *range(1, min(steps, 3))):
            clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9)).to(dtype)
            starts = [RowStart(clean=lambda _, clean=clean: clean)] * 2 if skipped else []
            told = (steps - skipped, [3, 4], (4, 8, 8), dtype, (), skipped, starts)
            a, b = (Sampler(one, CPU).start(*told) for one in (ours, theirs))
            assert torch.equal(a.timesteps, b.timesteps)
            assert torch.equal(a.latents, b.latents)
            for t in b.timesteps:
                scaled = b.scaled(t)
                assert torch.equal(a.scaled(t), scaled)
                prediction = torch.sin(3 * scaled)
                estimates = [run.advance(prediction, t) for run in (a, b)]
                assert torch.equal(*estimates)
                assert torch.equal(a.latents, b.latents)


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_do_the_same(kind):
    theirs = KINDS[kind]
    ours = Ours.like(theirs, 4)
    assert check_scheduler(ours, 4) == check_scheduler(theirs, 4)
    assert type(ours).__name__ == type(theirs).__name__


def test_what_it_is_made_of_can_be_written_down():
    ours = Ours.like(KINDS["mini"], 4)
    told = json.loads(json.dumps({"config": vars(ours.config), "schedules": ours.schedules}))
    again = Ours(told["config"], {int(n): Schedule(*map(tuple, one)) for n, one in told["schedules"].items()})
    assert (again.schedules, again.config) == (ours.schedules, ours.config)


def test_others_stay_with_diffusers():
    assert Ours.like(EulerDiscreteScheduler(), 4) is None
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        Ours({"prediction_type": "sample"}, {})
