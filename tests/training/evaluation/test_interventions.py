from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.modules import Modules
from turbolens_server.engine.types import Job
from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.sae.sae import Sae
from turbolens_server.sae.twin import decode_dense, encode_dense
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.unet.tapped import find_hook_points
from turbolens_server.unet.torch_unet import TorchUNet
from turbolens_training.activations.stream import collect_updates
from turbolens_training.evaluation.edits import CaptionPairs, edit_pictures, patch
from turbolens_training.evaluation.interventions import reconstruct, shift, splice, zero
from turbolens_training.evaluation.sampling import decode, saes_by_block, sample

CAPTIONS, EDITED, SEEDS = ["a red star", "a big ring"], ["a blue star", "a small ring"], [3, 4]


@pytest.mark.parametrize("steps", [1, 3])
def test_sampling_is_what_the_engine_does(sae_engine: Engine, steps: int) -> None:
    jobs = [Job(c, s, steps, *sae_engine.info.default_size) for c, s in zip(CAPTIONS, SEEDS, strict=True)]
    served = [result for result in sae_engine.run(jobs) if result is not None]
    found = sample(sae_engine, CAPTIONS, SEEDS, steps, keep=True)
    assert torch.allclose(found.latents, torch.stack([torch.from_numpy(r.latents) for r in served]), atol=1e-4)
    pictures = decode(sae_engine, found.latents)
    exact = torch.stack([torch.from_numpy(r.picture) for r in served]).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert (pictures - exact).abs().max() <= 1.01 / 127.5
    collected = collect_updates(sae_engine, CAPTIONS, SEEDS, steps)
    for block, updates in collected.by_block.items():
        assert torch.allclose(found.updates[block], updates, atol=1e-4)


def test_adding_nothing_changes_no_bit(sae_engine: Engine) -> None:
    own = sample(sae_engine, CAPTIONS, SEEDS, 2, keep=True)
    nothing = {block: torch.zeros_like(x) for block, x in own.updates.items()}
    for intervention in (shift(nothing), zero(()), splice({})):
        again = sample(sae_engine, CAPTIONS, SEEDS, 2, intervene=intervention)
        assert torch.equal(again.latents, own.latents)


def test_patching_every_block_gives_the_picture_of_the_other_caption(sae_engine: Engine) -> None:
    """True where captions reach the picture through the patched blocks alone, which this model is made to do."""
    parts = sae_engine.components
    unet = copy.deepcopy(parts.unet)
    with torch.no_grad():
        pooled_width = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
        unet.add_embedding.linear_1.weight[:, :pooled_width] = 0
    points = find_hook_points(unet, parts.vae_downscale)
    info = dataclasses.replace(sae_engine.info, hook_points=tuple(points.values()), saes={})
    read = dataclasses.replace(parts.modules.get(), unet=unet)
    other = dataclasses.replace(parts, modules=Modules(lambda: read))
    engine = Engine(other, TorchUNet(unet), info, torch.device("cpu"))
    base, wanted = (sample(engine, captions, SEEDS, 2, keep=True) for captions in (CAPTIONS, EDITED))
    apart = (base.latents - wanted.latents).abs().max()
    pairs = CaptionPairs(CAPTIONS, EDITED, SEEDS)
    methods = {"all": patch(list(points)), "one": patch(["mid.0"])}
    found = edit_pictures(engine, {}, pairs, methods, steps=2, batch=2, title="test")
    assert (found["all"] - wanted.latents).abs().max() < 1e-3 * apart
    assert (found["one"] - wanted.latents).abs().max() > 1e-2 * apart


def test_zero_is_what_replacing_by_nothing_does(sae_engine: Engine) -> None:
    own = sample(sae_engine, CAPTIONS, SEEDS, 1)
    zeroed = sample(sae_engine, CAPTIONS, SEEDS, 1, intervene=zero(["mid.0"])).latents
    nothing = Edit("replace", (WeightedFeature("mid.0", 0),), 0.0, Unit.RAW)
    jobs = [Job(c, s, 1, *sae_engine.info.default_size, (nothing,)) for c, s in zip(CAPTIONS, SEEDS, strict=True)]
    served = torch.stack([torch.from_numpy(result.latents) for result in sae_engine.run(jobs) if result is not None])
    assert torch.allclose(zeroed, served, atol=1e-4)
    assert not torch.allclose(zeroed, own.latents, atol=1e-4)


def identity_sae(d_model: int, hook_point: str) -> Sae:
    """An SAE that reconstructs everything: a feature for each dimension and sign."""
    eye = torch.eye(d_model)
    rows = torch.cat([eye, -eye])
    weights = SaeWeights(rows.T.contiguous(), torch.zeros(2 * d_model), rows, torch.zeros(d_model))
    bundle = Bundle(hook_point, hook_point, "topk", 2 * d_model, weights, None, "", None, {})
    return Sae(bundle, torch.device("cpu"))


def test_splicing_an_sae_that_loses_nothing_changes_nothing(sae_engine: Engine) -> None:
    own = sample(sae_engine, CAPTIONS, SEEDS, 2)
    saes = {point.name: identity_sae(point.d_model, point.name) for point in sae_engine.info.hook_points}
    spliced = sample(sae_engine, CAPTIONS, SEEDS, 2, intervene=splice(saes))
    assert torch.allclose(spliced.latents, own.latents, atol=1e-4)
    lossy = sample(sae_engine, CAPTIONS, SEEDS, 2, intervene=splice(saes_by_block(sae_engine)))
    assert not torch.allclose(lossy.latents, own.latents, atol=1e-2)


def test_reconstruction_is_that_of_the_dense_twin(sae_engine: Engine) -> None:
    for sae in saes_by_block(sae_engine).values():
        x = torch.randn(2, 5, sae.W_dec.shape[1], generator=torch.Generator().manual_seed(0))
        dense = decode_dense(sae.bundle, encode_dense(sae.bundle, x.flatten(0, 1))).reshape(x.shape)
        assert torch.allclose(reconstruct(sae, x), dense, atol=1e-5)


def test_a_shift_by_a_decoder_row_is_the_engines_add(sae_engine: Engine) -> None:
    sae = saes_by_block(sae_engine)["up.0.0"]
    assert sae.bundle.stats is not None
    delta = 6.0 * float(sae.bundle.stats.mean[5]) * sae.W_dec[5]
    shifted = sample(sae_engine, CAPTIONS, SEEDS, 2, intervene=shift({"up.0.0": delta.expand(2, 2, 1, -1)}))
    edit = Edit("add", (WeightedFeature("up.0.0", 5),), 6.0)
    jobs = [Job(c, s, 2, *sae_engine.info.default_size, (edit,)) for c, s in zip(CAPTIONS, SEEDS, strict=True)]
    served = torch.stack([torch.from_numpy(r.latents) for r in sae_engine.run(jobs) if r is not None])
    assert torch.allclose(shifted.latents, served, atol=1e-4)


def test_every_hook_point_needs_one_sae_and_no_more(tiny_engine: Engine) -> None:
    with pytest.raises(ValueError, match="found none"):
        saes_by_block(tiny_engine)
