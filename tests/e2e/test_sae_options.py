"""Callers who choose k and prefix of a Matryoshka, over a real socket: what they get is the SAE's own formula."""

from __future__ import annotations

import asyncio
import concurrent.futures

import numpy as np
import pytest
import torch

import turbolens as tl
from turbolens_server.embedded import start
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.bundle import Bundle, Nesting, SaeWeights, load_bundle, save_bundle
from turbolens_server.sae.twin import encode_dense
from turbolens_training.activations.stream import collect_updates

PROMPT, AT = "a big red star", "mid.0"
D_SAE, K, K_MAX, PREFIXES = 96, 4, 8, (16, 48, 96)
CHOICES = ({}, {"k": 1}, {"k": K_MAX}, {"prefix": 16}, {"k": 7, "prefix": 48}, {"k": K, "prefix": D_SAE})


@pytest.fixture(scope="module")
def bundle(small_model, tmp_path_factory) -> Bundle:
    """A random Matryoshka for the small model."""
    folder = tmp_path_factory.mktemp("nested") / AT
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, 64, generator=torch.Generator().manual_seed(3)), dim=-1)
    save_bundle(
        folder, hook_point=AT, hook_module="mid_block.attentions.0", model_name="small", model_hash=None,
        architecture="turbolens-matryoshka", k=K, nesting=Nesting(K_MAX, PREFIXES), stats=None, provenance={},
        weights=SaeWeights(W_dec.T.contiguous(), torch.zeros(D_SAE), W_dec, torch.zeros(64)),
    )  # fmt: skip
    return load_bundle(folder)


@pytest.fixture(scope="module")
def nested(small_model, bundle):
    """A client of a server with the Matryoshka, and a TopK at another block."""
    folder, saes = small_model
    with (
        start(model=str(folder), sae=(str(bundle.folder), str(saes / "up.0.1"))) as server,
        tl.connect(server.target) as lens,
    ):
        yield server, lens


@pytest.fixture(scope="module")
def update(small_model, bundle) -> torch.Tensor:
    """What the block writes for the prompt and seed 7 at each of two steps, [2, P, 64]."""
    engine = load_engine(model=str(small_model[0]), saes=[str(bundle.folder)])
    return collect_updates(engine, [PROMPT], [7], 2).by_block[AT][:, 0]


def asked(choice: dict[str, int]) -> dict[str, dict[str, int]]:
    return {name: {AT: number} for name, number in choice.items()}


def dense(block: tl.BlockFeatures) -> torch.Tensor:
    return torch.from_numpy(block.to_dense()).flatten(1, 2)


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Activations are those of the formula, but where two are as good as tied for the last place."""
    swapped = (found > 0) != (expected > 0)
    assert swapped.float().mean() < 1e-3
    assert torch.allclose(found[~swapped], expected[~swapped], rtol=1e-3, atol=1e-3)


def test_the_model_tells_what_may_be_chosen(nested):
    matryoshka, topk = nested[1].model().saes
    assert (matryoshka.k, matryoshka.k_max, tuple(matryoshka.prefixes)) == (K, K_MAX, PREFIXES)
    assert (topk.k, topk.k_max, tuple(topk.prefixes)) == (6, 0, ())


@pytest.mark.parametrize("choice", CHOICES)
def test_features_are_those_of_the_formula_at_that_k_and_prefix(choice, nested, update, bundle):
    _, lens = nested
    expected = torch.stack([encode_dense(bundle, x, **choice) for x in update])
    whole = lens.extract(PROMPT, seed=7, steps=2, float32=True, **asked(choice))
    assert_alike(dense(whole[AT]), expected)
    beside = lens.generate(PROMPT, seed=7, steps=2, features=True, float32=True, **asked(choice)).features
    told = {"seed": 7, "steps": 2, "float32": True, **asked(choice)}
    streams = lens.stream_features(PROMPT, **told), lens.stream_generate(PROMPT, features=[AT], **told)
    for found in (beside[AT], *([e.block for e in s if isinstance(e, tl.Features)] for s in streams)):
        steps = [b for b in found if b.sae == AT] if isinstance(found, list) else [found.at(0), found.at(1)]
        for step, block in enumerate(steps):
            assert np.array_equal(block.to_dense()[0], whole[AT].to_dense()[step])
    plain = lens.extract(PROMPT, seed=7, steps=2, float32=True)
    assert np.array_equal(plain["up.0.1"].to_dense(), whole["up.0.1"].to_dense()), "the other SAE is as it was"


def test_callers_with_different_choices_share_a_batch_and_get_what_they_get_alone(nested):
    _, lens = nested

    def extract(choice):
        return lens.extract(PROMPT, seed=7, saes=[AT], float32=True, **asked(choice))

    alone = [extract(choice) for choice in CHOICES]
    for _ in range(20):  # which requests meet is a matter of timing
        with concurrent.futures.ThreadPoolExecutor(len(CHOICES)) as pool:
            together = list(pool.map(extract, CHOICES))
        for one, shared in zip(alone, together, strict=True):
            assert_alike(dense(shared[AT]), dense(one[AT]))
        if max(found.batch_size for found in together) > 1:
            return
    pytest.fail("no two requests were ever batched")


def test_edits_see_the_activations_that_the_caller_asked_for(nested):
    """A feature that is active at the SAE's own k and at no place at k = 1: `scale` then has nothing to act on."""
    _, lens = nested
    own, first = (dense(lens.extract(PROMPT, seed=7, saes=[AT], **asked(choice))[AT])[0] for choice in ({}, {"k": 1}))
    feature = int(torch.where((first > 0).any(0), 0, own.sum(0)).argmax())
    assert own[:, feature].any()
    picture = {"seed": 7, "latents": True}
    plain = lens.generate(PROMPT, **picture).latents
    edit = [tl.ablate((AT, feature))]
    assert not np.array_equal(lens.generate(PROMPT, steer=edit, **picture).latents, plain)
    chosen = lens.generate(PROMPT, steer=edit, k={AT: 1}, **picture)
    assert np.array_equal(chosen.latents, plain)
    assert (chosen.provenance.run.k, chosen.provenance.run.prefix) == ({AT: 1}, {})


@pytest.mark.parametrize(
    ("arguments", "field", "says"),
    [
        ({"k": {"up.0.1": 5}}, "run.sae_options[0].k", "got 5; up.0.1 allows only 6"),
        ({"k": {AT: 9}}, "run.sae_options[0].k", "allows 1 to 8"),
        ({"prefix": {AT: 20}}, "run.sae_options[0].prefix", "allows 16, 48, 96"),
        ({"prefix": {"down.9": 20}}, "run.sae_options[0].sae", "this server has mid.0, up.0.1"),
        (
            {"prefix": {AT: 16}, "only": (AT, 16)},
            "run.features.only[0].index",
            "must be 0 to 15 for mid.0 at prefix 16",
        ),
        (
            {"prefix": {AT: 16}, "steer": [tl.add((AT, 40), 1, unit="raw")]},
            "run.edits[0].features[0].feature.index",
            "at prefix 16",
        ),
    ],
)
def test_what_an_sae_does_not_allow_is_refused_by_field(arguments, field, says, nested):
    with pytest.raises(tl.InvalidRequest) as caught:
        nested[1].extract(PROMPT, seed=7, **arguments)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert says in violation.description


def test_the_async_client_asks_the_same(nested):
    server, lens = nested

    async def ask():
        async with tl.aio.connect(server.target) as alens:
            return await alens.extract(PROMPT, seed=7, k={AT: 2}, prefix={AT: 48})

    found, expected = asyncio.run(ask()), lens.extract(PROMPT, seed=7, k={AT: 2}, prefix={AT: 48})
    assert np.array_equal(found[AT].to_dense(), expected[AT].to_dense())


@pytest.mark.parametrize("given", [
    {"features": [AT]},
    {"features": True, "steer": [tl.scale(f"{AT}/3", 2)]},
    {"steer": [tl.scale(f"{AT}/3", 2)]},
])  # fmt: skip
def test_a_picture_with_features_read_smaller_beside_it_is_made_again(given, nested, tmp_path):
    lens = nested[1]
    lens.generate(PROMPT, seed=7, k={AT: 3}, prefix={AT: 16}, **given).save(tmp_path / "a.png")
    assert str(lens.replay(tmp_path / "a.png")) == "equal"
