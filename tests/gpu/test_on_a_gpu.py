"""What only a CUDA GPU can show: recorded graphs and fused kernels do what the plain walk and plain torch do."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from turbolens_server.engine.types import Job
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from turbolens_server.cuda_graphs import Graphed
from turbolens_server.engine.engine import Engine
from turbolens_server.kernels import fused, plain, twin
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.sae import Sae
from turbolens_server.steering.masks import Box, BoxMask
from turbolens_server.unet.fused import FusedBlocks
from turbolens_server.unet.torch_unet import TorchUNet

LEFT = BoxMask((Box(0, 0, 0.5, 1),))


def edit(kind, amount, sae, *indices, mask=None):
    return Edit(kind, tuple(WeightedFeature(sae, index) for index in indices), amount, Unit.RAW, mask)


@pytest.fixture(scope="module", autouse=True)
def exact_convolutions():
    """Without the ten-bit operands that cuDNN takes by default: what is compared is the path, not the rounding."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def graphed() -> Engine:
    return load_engine(device="cuda", dtype="float32", backend="torch")


@pytest.fixture(scope="module")
def eager(graphed) -> Engine:
    """The same engine with the walk launched as it goes."""
    return Engine(graphed.components, TorchUNet(graphed.components.unet), graphed.info, graphed.device)


@pytest.fixture(scope="module")
def on_cpu() -> Engine:
    return load_engine(device="cpu")


def jobs(engine, steps=2):
    """Rows with no edit, open ones, closed ones, and several at one block."""
    every, size = tuple(engine.info.saes), engine.info.default_size
    return [
        Job("a big red star on the left, night background", 1, steps, *size, saes=every),
        Job("a circle", 2, steps, *size, edits=(edit("add", 8.0, "up.0.0", 3, 5, mask=LEFT),), saes=("up.0.1",)),
        Job("a cross", 3, steps, *size, edits=(edit("scale", 0.0, "up.0.1", *range(40)),)),
        Job(
            "a ring", 4, steps, *size, saes=("mid.0", "up.0.0"),
            edits=(
                edit("set", 4.0, "down.2.1", 7, mask=LEFT), edit("replace", 6.0, "mid.0", 1),
                edit("add", -3.0, "down.2.1", 7, 9),
            ),
        ),
    ]  # fmt: skip


def same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert np.linalg.norm(a.latents - b.latents) <= tolerance * np.linalg.norm(b.latents)
        assert np.abs(a.picture.astype(int) - b.picture).mean() <= 255 * tolerance
        for mine, other in zip(a.features, b.features, strict=True):
            assert (mine.sae, mine.step) == (other.sae, other.step)
            assert abs(mine.values.sum() - other.values.sum()) <= 10 * tolerance * other.values.sum()


def test_the_recorded_walk_is_the_walk(graphed, eager):
    for _ in range(2):  # the second replays alone
        for batch in (1, 3, 4):
            same(graphed.run(jobs(graphed)[-batch:]), eager.run(jobs(eager)[-batch:]), 5e-3)


def test_a_gpu_makes_what_a_cpu_makes(graphed, on_cpu):
    same(graphed.run(jobs(graphed)), on_cpu.run(jobs(on_cpu)), 1e-2)


def test_compiled_blocks_are_the_blocks(graphed, eager):
    unet = graphed.components.unet
    compiled = Engine(graphed.components, TorchUNet(unet, FusedBlocks(unet)), graphed.info, graphed.device)
    same(compiled.run(jobs(compiled)), eager.run(jobs(eager)), 5e-3)
    same(compiled.run(jobs(compiled)[:1]), eager.run(jobs(eager)[:1]), 5e-3)


def test_a_request_does_not_depend_on_its_mates(graphed):
    together = graphed.run(jobs(graphed))
    same(together, [graphed.run([job])[0] for job in jobs(graphed)], 5e-3)


def test_a_recorded_function_serves_several_threads():
    function = Graphed(lambda x: (x * 2 + 1, x.sum()))
    wrong = []

    def call(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                x = torch.randn(64, 64, device="cuda", generator=generator)
                doubled, total = function(x)
                if not (torch.equal(doubled, x * 2 + 1) and torch.allclose(total, x.sum(), atol=1e-2)):
                    wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("rows", [1, 37, 256, 2048])
def test_kernels_are_their_twins(rows):
    torch.manual_seed(rows)
    d_model, d_sae, k = 1280, 5120, 10
    x = torch.randn(rows, d_model, device="cuda").half()
    W_enc = (torch.randn(d_model, d_sae, device="cuda") / d_model**0.5).half()
    bias = 0.1 * torch.randn(d_sae, device="cuda")
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_model, device="cuda"), dim=1)
    values, indices, _ = fused.encode_topk(x, W_enc, bias, k)
    pre = x.float() @ W_enc.float() + bias
    assert torch.allclose(values, pre.topk(k).values.relu(), atol=5e-3)
    assert torch.allclose(pre.gather(1, indices), values, atol=5e-3)
    threshold = torch.full((d_sae,), 2.75, device="cuda")
    active, where, counts = fused.encode_jumprelu(x, W_enc, bias, threshold, 256)
    assert (counts - (pre > threshold).sum(1)).abs().max() <= 1  # rounding at the threshold
    assert torch.allclose(pre.gather(1, where)[active > 0], active[active > 0], atol=5e-3)
    decoded = fused.gather_decode(values, indices, W_dec)
    assert torch.allclose(decoded, plain.gather_decode(values, indices, W_dec), atol=1e-3)
    slow = twin.gather_decode(values[:2].cpu(), indices[:2].cpu(), W_dec.cpu())
    assert torch.allclose(decoded[:2].cpu().double(), slow, atol=1e-3)


@pytest.mark.parametrize("name", ["down.2.1", "up.0.1"])
def test_codes_in_half_precision_are_those_in_single(on_cpu, name):
    bundle = on_cpu.info.saes[name].bundle
    x = 3 * torch.randn(2, 64, bundle.d_in)
    half = Sae(bundle, torch.device("cuda"), torch.float16)
    ours, theirs = half.encode(x.cuda().half()), Sae(bundle, torch.device("cpu")).encode(x)
    assert torch.allclose(ours.values.cpu(), theirs.values, atol=2e-2 * float(theirs.values.max()))
    reconstructed = half.decode(ours).cpu()
    assert (reconstructed - Sae(bundle, torch.device("cpu")).decode(theirs)).norm() <= 0.05 * reconstructed.norm()
