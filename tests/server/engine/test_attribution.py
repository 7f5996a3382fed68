"""Attribution of features at z: exact sums, held to ablation; asking for one changes nothing for anybody."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolens_server.engine.batcher import batch_key
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Attribute, Job, Region, Result
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.attribution import contributions
from turbolens_server.sae.bundle import Bundle, SaeWeights, save_bundle
from turbolens_server.sae.twin import contributions_by_ablation, encode_dense
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import Box, BoxMask
from turbolens_server.unet.points import module_of
from turbolens_training.activations.stream import collect_updates

CROSS, SELF = "up.0.0.attn2.0.z", "mid.0.attn1.0.z"
D_SAE = 72


def random_weights(d: int, seed: int = 0) -> SaeWeights:
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, d, generator=g), dim=-1)
    return SaeWeights(W_dec.T.contiguous(), torch.randn(D_SAE, generator=g), W_dec, torch.randn(d, generator=g))


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("at-z")
    points = {p.name: p for p in load_engine(model=str(tiny_folder), saes=[]).info.other_points}
    for at in (CROSS, SELF):
        save_bundle(
            folder / at, hook_point=at, hook_module=module_of(at), model_name="tiny", model_hash=None,
            architecture="topk", k=5, weights=random_weights(points[at].d_model), stats=None, provenance={},
        )  # fmt: skip
    return load_engine(model=str(tiny_folder), saes=[str(folder)])


def job(engine: Engine, sae: str, index: int = 0, step: int = 1, prompt: str = "a red star", **more: object) -> Job:
    return Job(prompt, 3, 2, *engine.info.default_size, attribute=Attribute(sae, index, step), **more)  # type: ignore[arg-type]


def alone(engine: Engine, one: Job) -> Result:
    (result,) = engine.run([one])
    assert result is not None
    return result


@settings(max_examples=20)
@given(
    shape=st.tuples(*(st.integers(1, 4) for _ in range(4))), seed=st.integers(0, 2**31), index=st.integers(0, D_SAE - 1)
)
def test_contributions_are_what_ablation_takes_away(shape: tuple[int, int, int, int], seed: int, index: int) -> None:
    heads, positions, sources, width = shape
    g = torch.Generator().manual_seed(seed)
    pattern = torch.randn(heads, positions, sources, generator=g).softmax(-1)
    values, weights = torch.randn(sources, heads * width, generator=g), random_weights(heads * width, seed)
    bundle = Bundle("z", CROSS, "topk", 5, weights, None, "", None, {})
    found = contributions(pattern, values, weights.W_enc[:, index], weights.b_dec)
    assert found.shape == (heads, positions, sources)
    torch.testing.assert_close(found, contributions_by_ablation(pattern, values, bundle, index), atol=1e-4, rtol=0)
    z = torch.cat([pattern[h] @ values[:, h * width : (h + 1) * width] for h in range(heads)], -1)
    pre = (z - weights.b_dec) @ weights.W_enc[:, index] + weights.b_enc[index]
    torch.testing.assert_close(found.sum((0, 2)) + weights.b_enc[index], pre, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sae", [CROSS, SELF])
def test_a_thousand_sums_are_the_pre_activation_and_what_training_collects_is_what_is_explained(
    served: Engine, sae: str
) -> None:
    """At 1e-4, over every feature and position, of the z of the same run."""
    bundle = served.info.saes[sae].bundle
    z = collect_updates(served, ["a red star"], [3], 2).by_block[sae][1, 0]
    pre = (z - bundle.weights.b_dec) @ bundle.weights.W_enc + bundle.weights.b_enc
    active = encode_dense(bundle, z)
    cases = 0
    for start in range(0, D_SAE, 8):
        for index, result in enumerate(served.run([job(served, sae, i) for i in range(start, start + 8)]), start):
            assert result is not None
            found = result.attribution
            assert found is not None
            assert found.height * found.width == len(z) == len(found.by_source)
            assert len(found.tokens) == (77 if sae == CROSS else 0)
            assert found.by_source.shape[1] == (len(found.tokens) or len(z))
            for parts in (found.by_source, found.by_head):
                assert np.abs(parts.sum(1) + found.bias - found.pre).max() < 1e-4
            assert np.abs(found.pre - pre[:, index].numpy()).max() < 1e-4
            assert np.abs(found.activation - active[:, index].numpy()).max() < 1e-4
            cases += found.pre.size
    assert cases >= 1000


def test_asking_changes_no_bit_for_anybody(served: Engine) -> None:
    """The picture is the plain one; others do not share its batch, which compiled code cannot run."""
    size, asking = served.info.default_size, job(served, CROSS, 2)
    a = alone(served, dataclasses.replace(asking, attribute=None, saes=(CROSS,)))
    b = alone(served, dataclasses.replace(asking, saes=(CROSS,)))
    assert np.array_equal(a.latents, b.latents)
    assert np.array_equal(a.picture, b.picture)
    assert [codes.values.tobytes() for codes in a.features] == [codes.values.tobytes() for codes in b.features]
    assert a.attribution is None
    assert b.attribution is not None
    assert batch_key(asking) == batch_key(dataclasses.replace(asking, prompt="a blue ring", seed=5))
    assert batch_key(asking) != batch_key(Job("a red star", 3, 2, *size))


def test_own_edits_come_after_and_earlier_ones_before(served: Engine) -> None:
    def edited(sae: str) -> tuple[Edit, ...]:
        return (Edit("add", (WeightedFeature(sae, 1),), 30.0, Unit.RAW, steps=(1, 2)),)

    plain = alone(served, job(served, CROSS)).attribution
    own = alone(served, job(served, CROSS, edits=edited(CROSS))).attribution
    earlier = alone(served, job(served, CROSS, edits=edited(SELF))).attribution
    assert plain is not None
    assert own is not None
    assert earlier is not None
    assert np.array_equal(plain.by_source, own.by_source)
    assert not np.array_equal(plain.by_source, earlier.by_source)


def test_regions_tokens_follow_and_are_heard_under_their_mask_alone(served: Engine) -> None:
    region = Region(BoxMask((Box(0, 0, 0.5, 1),)), "a ring")
    found = alone(served, job(served, CROSS, regions=(region,))).attribution
    assert found is not None
    assert len(found.tokens) == 2 * 77
    assert found.tokens[77 + 2].startswith("ring")
    right = found.by_source.reshape(found.height, found.width, -1)[:, found.width // 2 :, 77:]
    assert not right.any()
    assert found.by_source[:, 77:].any()
    assert np.abs(found.by_source.sum(1) + found.bias - found.pre).max() < 1e-4
