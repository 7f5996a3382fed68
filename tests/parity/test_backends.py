"""Every backend makes the pictures and features of PyTorch, for any mix of edits in a batch."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Guidance, Job, Reference, Region
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hashes import hash_unet
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.bundle import SaeWeights, save_bundle
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import Box, BoxMask, PictureMask
from turbolens_server.unet.compiled import CompiledParts
from turbolens_server.unet.fused import FusedBlocks
from turbolens_server.unet.points import module_of
from turbolens_server.unet.torch_unet import TorchUNet

PIXELS = 2  # of 255
VALUES = 1e-3  # of a feature's largest activation
LEFT = BoxMask((Box(0, 0, 0.5, 1),))


@pytest.fixture(scope="module")
def small(small_model, graph_cache):
    """A random small model: the engines on PyTorch and on ONNX Runtime."""
    folder, saes = small_model
    model = {"model": str(folder), "saes": [str(saes)]}
    return load_engine(**model, backend="torch"), load_engine(**model, backend="onnx", cache=graph_cache)


@pytest.fixture(scope="module")
def small_regions(small, small_model, graph_cache):
    """The random small model on PyTorch, and on ONNX Runtime with regions."""
    folder, saes = small_model
    model = {"model": str(folder), "saes": [str(saes)], "backend": "onnx", "cache": graph_cache}
    return small[0], load_engine(**model, onnx_regions=True)


@pytest.fixture(scope="module")
def mini_regions(engine, graph_cache):
    """The embedded model on PyTorch, and on ONNX Runtime with regions."""
    return engine, load_engine(backend="onnx", cache=graph_cache, onnx_regions=True)


@pytest.fixture(scope="module")
def mini(engine, graph_cache):
    """The embedded model: the engines on PyTorch and on ONNX Runtime."""
    return engine, load_engine(backend="onnx", cache=graph_cache)


@pytest.fixture
def pair(request):
    return request.getfixturevalue(request.param)


def mixed_jobs(info, count: int, steps: int) -> list[Job]:
    """`count` jobs that between them hold every kind of edit, masks, step ranges, and none."""
    first, *_, last = info.saes

    def edit(kind, sae, amount, *features, **more):
        return Edit(kind, tuple(WeightedFeature(sae, index) for index in features), amount, Unit.RAW, **more)

    edits = [
        (edit("scale", first, 0.0, *range(0, 90, 2)), edit("set", last, 3.0, 5, mask=LEFT)),
        (edit("add", first, 4.0, 3, 7, mask=LEFT), edit("add", last, -2.0, 11)),
        (),
        (edit("replace", last, 2.0, 8, mask=LEFT), edit("scale", last, 1.5, *range(40))),
        (edit("replace", first, 1.0, 2),),
        (edit("set", first, 2.0, 9, steps=(steps - 1, steps)), edit("add", first, 3.0, 9)),
        (edit("add", last, 5.0, 60),),
        (edit("scale", last, 0.5, *range(90)),),
    ]
    size = info.default_size
    return [
        Job(f"a big red star {row}", 7 + row, steps, *size, edits=edits[row], saes=tuple(info.saes))
        for row in range(count)
    ]


def dense(codes) -> np.ndarray:
    out = np.zeros((len(codes.counts), codes.d_sae), np.float32)
    out[np.repeat(np.arange(len(codes.counts)), codes.counts), codes.indices] = codes.values
    return out


def assert_alike(a, b) -> None:
    assert np.abs(a.picture.astype(int) - b.picture).max() <= PIXELS
    assert [(c.sae, c.step) for c in a.features] == [(c.sae, c.step) for c in b.features]
    for ours, theirs in zip(a.features, b.features, strict=True):
        one, other = dense(ours), dense(theirs)
        swapped = (one > 0) != (other > 0)
        # Only what is as good as tied with the k-th may be in one set and not in the other.
        tied = np.where(one > 0, one, np.inf).min(-1, keepdims=True) * (1 + VALUES) + VALUES
        assert (np.maximum(one, other)[swapped] <= np.broadcast_to(tied, one.shape)[swapped]).all()
        assert swapped.sum() <= 0.002 * (one > 0).sum()
        assert np.abs(np.where(swapped, 0, one - other)).max() <= VALUES * one.max()


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("pair", ["small", "mini"], indirect=True)
def test_onnx_gives_what_torch_gives(pair, count):
    torch_engine, onnx_engine = pair
    jobs = mixed_jobs(torch_engine.info, count, steps=2)
    expected = torch_engine.run(jobs)
    for a, b in zip(expected, onnx_engine.run(jobs), strict=True):
        assert_alike(a, b)
    assert np.ptp([result.latents.mean() for result in expected]) > 0 or count == 1


@pytest.fixture(scope="module")
def compiled(small, small_model, graph_cache):
    """The random small model as native code."""
    folder, saes = small_model
    return load_engine(model=str(folder), saes=[str(saes)], backend="torch-compile", cache=graph_cache)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_compiled_code_gives_what_torch_gives(small, compiled, count):
    assert (compiled.info.backend, compiled.info.backend_reason) == ("torch-compile", "asked for: torch-compile")
    jobs = mixed_jobs(compiled.info, count, steps=2)
    for a, b in zip(small[0].run(jobs), compiled.run(jobs), strict=True):
        assert_alike(a, b)
        assert (a.backend, b.backend) == ("torch", "torch-compile")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_a_picture_has_the_same_bits_wherever_it_stands(compiled):
    one, *others = mixed_jobs(compiled.info, 4, steps=2)
    first, last = compiled.run([one, *others])[0], compiled.run([*others, one])[-1]
    assert np.array_equal(first.picture, last.picture)
    assert np.array_equal(first.latents, last.latents)


@pytest.mark.slow
@pytest.mark.timeout(600)
@torch.inference_mode()
def test_compiled_pictures_decoded_side_by_side_have_the_same_bits(compiled, graph_cache, monkeypatch):
    folder = next((graph_cache / "packages").glob("*/chains.json")).parent
    walk = compiled.begin(compiled.components.text.encode_all([f"star {n}" for n in range(6)]), range(6), 1)
    found = []
    for cores in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        parts = CompiledParts.load(folder)
        decode = torch.inference_mode()(parts.decode)
        found.append([*(map if cores == 1 else parts.workers.map)(decode, walk.noise.split(1))])
    assert len(found[0]) == 6
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_while_compiled_code_runs_other_threads_have_their_turn(compiled):
    parts, latents = compiled.running.decoder._parts, torch.randn(1, 4, 16, 16)
    inside, done = False, False

    def work():
        nonlocal inside, done
        with torch.inference_mode():
            for _ in range(20):
                inside = True
                parts.decode(latents)
                inside = False
        done = True

    thread, turns = threading.Thread(target=work), 0
    thread.start()
    while not done:
        turns += inside
        time.sleep(0)
    thread.join()
    assert turns > 100, "a thread waits until the code has run"


@pytest.mark.slow
@pytest.mark.timeout(600)
@torch.inference_mode()
def test_compiled_text_is_the_text(small, compiled):
    for count in (1, 2, 8):
        prompts = [f"star {number}" for number in range(count)]
        a, b = (engine.components.text.encode_together(prompts) for engine in (small[0], compiled))
        torch.testing.assert_close(a.hidden, b.hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.pooled, b.pooled, rtol=1e-4, atol=1e-4)
        assert not torch.equal(a.hidden, b.hidden), "nothing was compiled"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_was_not_compiled_for_runs_as_torch_does(small, compiled):
    info = compiled.info
    size = (info.default_size[0], 2 * info.default_size[1])
    job = Job("a star", 3, 1, *size)
    ours, theirs = small[0].run([job])[0].picture, compiled.run([job])[0].picture
    assert np.abs(ours.astype(np.int16) - theirs).max() <= 1  # the text is encoded by compiled code all the same


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_updates_are_read_without_a_prediction(small, compiled):
    found = []
    for engine in (small[0], compiled):
        seen: dict[str, torch.Tensor] = {}
        walk = engine.begin(engine.components.text.encode_all(["a star"] * 2), (1, 2), 1)
        walk.look(walk.timesteps[0], Reader(frozenset({"mid.0"}), seen))
        found.append(seen)
    assert found[0].keys() == found[1].keys() == {"mid.0"}
    torch.testing.assert_close(found[0]["mid.0"], found[1]["mid.0"], rtol=1e-4, atol=1e-4)


class Reader:
    """A tap that keeps the updates of some points."""

    closed: frozenset[str] = frozenset()

    def __init__(self, at, seen) -> None:
        self.at, self.seen = at, seen

    def __call__(self, point, update, grid):
        self.seen[point] = update
        return update

    def read(self, point, update, grid):
        self.seen[point] = update

    def affine(self, point, grid):
        return None


@pytest.mark.parametrize("count", [1, 3, 8])
def test_fused_blocks_give_what_torch_gives(engine, count):
    """The blocks that are compiled on a GPU, here traced and run as they are."""
    unet = copy.deepcopy(engine.components.unet)
    fused = Engine(engine.components, TorchUNet(unet, FusedBlocks(unet, backend="eager")), engine.info, engine.device)
    jobs = mixed_jobs(engine.info, count, steps=2)
    for a, b in zip(engine.run(jobs), fused.run(jobs), strict=True):
        assert_alike(a, b)


@pytest.mark.parametrize("pair", ["small", "mini"], indirect=True)
def test_a_request_does_not_depend_on_its_batch_mates(pair):
    onnx_engine = pair[1]
    jobs = mixed_jobs(onnx_engine.info, 5, steps=1)
    together = onnx_engine.run(jobs)
    for row in (0, 2, 3):
        assert_alike(onnx_engine.run([jobs[row]])[0], together[row])


SOFT = PictureMask(np.linspace(0, 1, 16, dtype=np.float32)[None].repeat(16, 0))
REGIONS = (Region(LEFT, "a big green square"), Region(SOFT, "a small pink cross"))
WITH_REGIONS = ["small_regions", pytest.param("mini_regions", marks=[pytest.mark.slow, pytest.mark.timeout(600)])]


def region_jobs(info) -> list[Job]:
    """Two regions each: alone, with every kind of edit, with guidance, with a reference that is patched in, and two
    under one mask, the first of which is cut."""
    size, saes = info.default_size, tuple(info.saes)
    patch = Edit("patch", (), 1.0, points=(info.saes[saes[0]].hook_point,), reference="r")
    plain = Job("a star", 1, 2, *size, regions=REGIONS, saes=saes)
    return [
        plain,
        *(dataclasses.replace(job, regions=REGIONS) for job in mixed_jobs(info, 5, 2)),
        dataclasses.replace(plain, guidance=Guidance(3.0, 0.5, "snow")),
        dataclasses.replace(plain, edits=(patch,), references=(Reference("r", "a blue ring", 1),)),
        dataclasses.replace(plain, regions=(Region(LEFT, "snow " * 100), Region(LEFT, "a red ring"))),
    ]


@pytest.mark.parametrize("pair", WITH_REGIONS, indirect=True)
def test_onnx_hears_regions_as_torch_does(pair):
    torch_engine, onnx_engine = pair
    jobs = region_jobs(torch_engine.info)
    expected = torch_engine.run(jobs)
    for a, b in zip(expected, onnx_engine.run(jobs), strict=True):
        assert_alike(a, b)
        assert np.abs(a.latents - b.latents).max() <= 1e-3 * np.abs(a.latents).max()
        assert a.tokens_cut == b.tokens_cut
    assert expected[-1].tokens_cut > 20
    for job, found in zip(jobs, expected, strict=True):
        for regions in ((), job.regions[:1]):  # each of the two is heard
            (other,) = torch_engine.run([dataclasses.replace(job, regions=regions)])
            assert np.abs(found.latents - other.latents).max() > 3e-2


@pytest.mark.parametrize("pair", WITH_REGIONS, indirect=True)
def test_on_onnx_mates_with_other_regions_leave_every_bit(pair):
    onnx_engine = pair[1]
    plain, mate, *_ = region_jobs(onnx_engine.info)
    other = dataclasses.replace(plain, regions=REGIONS[::-1], prompt="snow", seed=9)
    one, two = (onnx_engine.run([first, mate])[1] for first in (plain, other))
    assert np.array_equal(one.latents, two.latents)
    assert np.array_equal(one.picture, two.picture)
    for ours, theirs in zip(one.features, two.features, strict=True):
        assert np.array_equal(ours.indices, theirs.indices)
        assert np.array_equal(ours.values, theirs.values)


def test_with_regions_served_a_plain_request_keeps_every_bit(small, small_regions):
    jobs = mixed_jobs(small[1].info, 3, steps=2)
    jobs = [dataclasses.replace(job, prompt=f"encoded now {row}") for row, job in enumerate(jobs)]
    for a, b in zip(small[1].run(jobs), small_regions[1].run(jobs), strict=True):
        assert np.array_equal(a.latents, b.latents)
        assert np.array_equal(a.picture, b.picture)


def test_regions_on_onnx_are_asked_for_and_in_float32(small, small_regions, small_model):
    plain, hearing = small[1].info, small_regions[1].info
    assert plain.region_strides == ()
    assert hearing.region_strides == small[0].info.region_strides != ()
    assert not hearing.opens_attention
    assert hearing.memory.weights > plain.memory.weights
    for asked in ({"backend": "torch"}, {"backend": "onnx", "dtype": "float16"}, {"backend": "tensorrt"}):
        with pytest.raises(LoadError, match=rf"--onnx-regions goes with .* this is --backend {asked['backend']} in"):
            load_engine(model=str(small_model[0]), onnx_regions=True, **asked)


def test_an_attention_layer_is_exported_read_and_steered(small_model, tmp_path, graph_cache):
    """And its z: in one graph with the block that they lie in."""
    (folder, saes), block, at, z = small_model, "up.0.1", "up.0.1.attn2.0", "up.0.1.attn2.0.z"
    W_dec = torch.nn.functional.normalize(torch.randn(96, 64, generator=torch.Generator().manual_seed(5)), dim=-1)
    for point in (at, z):
        save_bundle(
            tmp_path / point, hook_point=point, hook_module=module_of(point),
            model_name="small", model_hash=hash_unet(folder), architecture="topk", k=6,
            weights=SaeWeights(W_dec.T.contiguous(), torch.zeros(96), W_dec, torch.zeros(64)),
            stats=None, provenance={},
        )  # fmt: skip
    model = {"model": str(folder), "saes": [str(tmp_path), str(saes / block)]}
    torch_engine, onnx_engine = load_engine(**model), load_engine(**model, backend="onnx", cache=graph_cache)
    size = torch_engine.info.default_size
    add = Edit("add", (WeightedFeature(at, 3),), 40.0, Unit.RAW, mask=LEFT)
    ablate = Edit("scale", tuple(WeightedFeature(at, index) for index in range(90)), 0.0, Unit.RAW)
    after = Edit("add", (WeightedFeature(block, 3),), -4.0, Unit.RAW)
    at_z = Edit("scale", tuple(WeightedFeature(z, index) for index in range(90)), -9.0, Unit.RAW, mask=LEFT)
    lists = ((), (add,), (ablate,), (add, after), (at_z,), (at_z, ablate))
    jobs = [Job("a star", 7, 2, *size, edits=edits, saes=(at, block, z)) for edits in lists]
    plain, *steered = expected = torch_engine.run(jobs)
    for a, b in zip(expected, onnx_engine.run(jobs), strict=True):
        assert_alike(a, b)
        assert np.abs(a.latents - b.latents).max() <= 1e-3
    for one in steered:
        assert np.abs(one.latents - plain.latents).max() > 1e-2


def test_the_edits_of_the_test_change_pictures(small):
    torch_engine = small[0]
    for job in mixed_jobs(torch_engine.info, 8, steps=1):
        plain = torch_engine.run([Job(job.prompt, job.seed, 1, job.height, job.width)])[0]
        changed = np.abs(torch_engine.run([job])[0].latents - plain.latents).max()
        assert changed > 1e-2 if job.edits else changed == 0


def test_an_engine_tells_what_runs_it(small):
    torch_engine, onnx_engine = small
    assert (torch_engine.info.backend, torch_engine.info.backend_reason) == ("torch", "asked for: torch")
    assert onnx_engine.info.backend == "onnx"
    assert "onnxruntime" in onnx_engine.info.versions
    assert next(onnx_engine.components.unet.parameters()).is_meta, "the weights are in memory twice"
