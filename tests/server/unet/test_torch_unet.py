"""The fused and compiled walk: the same predictions, updates and pictures, and nothing compiled for an edit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.load import load_engine
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.unet.backend import BackendError
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.fused import FusedBlocks
from turbolens_server.unet.tapped import tapped_forward
from turbolens_server.unet.torch_unet import TorchUNet


def edit(kind, amount, *features, sae="mid.0"):
    return Edit(kind, tuple(WeightedFeature(sae, index) for index in features), amount, Unit.RAW)


def walk(unet, spec, blocks, batch, at):
    """Prediction and updates of a pass that doubles every update at `at`."""
    torch.manual_seed(batch)
    size, updates = 2 * spec.stride, {}
    sample = torch.randn(batch, spec.channels, size, size)
    text, pooled = torch.randn(batch, spec.tokens, spec.text_dim), torch.randn(batch, spec.pooled_dim)
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(batch, 1)

    def tap(point, update, grid):
        updates[point] = update.clone()
        return 2 * update

    timestep = torch.full((batch,), 500.0)
    with torch.inference_mode():
        prediction = tapped_forward(
            unet, sample, timestep, Conditions(text, pooled, time_ids), tap=tap, at=frozenset(at), blocks=blocks
        )
    return {"prediction": prediction, **updates}


@pytest.mark.parametrize("model", ["small_torch", "engine", "tiny_engine"])
@pytest.mark.parametrize("batch", [1, 3])
def test_fused_blocks_are_the_modules(model, batch, request):
    from turbolens_server.unet.spec import GraphSpec

    served = request.getfixturevalue(model)
    parts, info = served.components, served.info
    spec = GraphSpec.of(parts.unet.config, info.hook_points, parts.vae_downscale, info.max_prompt_tokens)
    points = [point.name for point in info.hook_points]
    at = [*points, f"{points[-1]}.attn1.0", f"{points[0]}.attn2.0"]
    expected = walk(parts.unet, spec, None, batch, at)
    unet = copy.deepcopy(parts.unet)
    found = walk(unet, spec, FusedBlocks(unet, backend="eager"), batch, at)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (tensor - found[name]).norm() <= 1e-4 * tensor.norm(), name
    # The modules' weights are views of the joined ones, and do what they did.
    again = walk(unet, spec, None, batch, at)
    assert all((tensor - again[name]).norm() <= 1e-4 * tensor.norm() for name, tensor in expected.items())


def test_no_edit_and_no_batch_size_past_the_second_compiles_anew(small_torch):
    parts = small_torch.components
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    unet = copy.deepcopy(parts.unet)
    compiled = Engine(parts, TorchUNet(unet, FusedBlocks(unet, backend=counter)), small_torch.info, torch.device("cpu"))
    size, wanted = small_torch.info.default_size, ("mid.0", "up.0.1")
    edits = [
        (),
        (edit("add", 3.0, 4),),
        (edit("add", -2.0, 1, 2), edit("replace", 1.0, 7, sae="up.0.1")),
        (edit("scale", 0.0, *range(96)),),
    ]
    counts = []
    for batch in (1, 2, 3, 5):
        for step, some in enumerate(edits):
            seeds = range(3, 3 + batch)
            jobs = [Job("a red star", seed, 1, *size, edits=some, saes=wanted if step % 2 else ()) for seed in seeds]
            for expected, found in zip(small_torch.run(jobs), compiled.run(jobs), strict=True):
                assert np.abs(expected.latents - found.latents).max() <= 1e-5 * np.abs(expected.latents).max()
                for ours, theirs in zip(expected.features, found.features, strict=True):
                    assert np.allclose(ours.values, theirs.values, atol=1e-3)
            counts.append(counter.frame_count)
    one, several = counts[:4], counts[4:]
    assert len(set(one)) == len(set(several)) == 1
    assert 0 < one[0] < several[0]
    torch._dynamo.reset()


def test_a_block_of_another_kind_is_refused_by_name(small_torch):
    unet = copy.deepcopy(small_torch.components.unet)
    unet.mid_block.resnets[0].output_scale_factor = 2.0
    with pytest.raises(BackendError, match=r"mid_block\.resnets\.0 .*scale.*--backend torch"):
        FusedBlocks(unet)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"backend": "tpu"}, "--backend tpu: no such backend; use auto, torch"),
        ({"backend": "tensorrt", "device": "cpu"}, "run on a GPU, not on cpu"),
        ({"backend": "onnx", "dtype": "bfloat16"}, "--dtype float32 or float16"),
    ],
)
def test_a_backend_that_cannot_run_fails_the_start(settings, says, small_model, tmp_path):
    with pytest.raises(LoadError) as caught:
        load_engine(model=str(small_model[0]), cache=tmp_path, **settings)
    assert says in str(caught.value)


def test_auto_says_what_it_took_and_why(engine):
    assert engine.info.backend == "torch"
    assert engine.info.backend_reason.startswith("auto: ")
