"""The compiled walk: one graph for every edit, and the same pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.load import LoadError, load_engine
from turbolens_server.engine.types import Edit, Job, Unit, WeightedFeature
from turbolens_server.unet.torch_unet import CompiledTorchUNet


def edit(kind, amount, *features, sae="mid.0"):
    return Edit(kind, tuple(WeightedFeature(sae, index) for index in features), amount, Unit.RAW)


def test_one_graph_serves_every_open_edit(small_torch, small_spec):
    parts = small_torch.components
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    unet = CompiledTorchUNet(parts.unet, small_spec, backend=counter)
    compiled = Engine(parts, unet, small_torch.info, torch.device("cpu"))
    size, wanted = small_torch.info.default_size, ("mid.0", "up.0.1")
    edits = [
        (),
        (edit("add", 3.0, 4),),
        (edit("add", -2.0, 1, 2), edit("replace", 1.0, 7, sae="up.0.1")),
        (edit("scale", 0.0, *range(96)),),
    ]
    for step, some in enumerate(edits):
        jobs = [Job("a red star", 3, 1, *size, edits=some, saes=wanted if step % 2 else ())]
        expected, found = small_torch.run(jobs)[0], compiled.run(jobs)[0]
        assert np.abs(expected.latents - found.latents).max() <= 1e-4
        assert len(expected.features) == len(found.features)
        for ours, theirs in zip(expected.features, found.features, strict=True):
            assert np.allclose(ours.values, theirs.values, atol=1e-3)
    assert counter.frame_count == 1
    torch._dynamo.reset()


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
