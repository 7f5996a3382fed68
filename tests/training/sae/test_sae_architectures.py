"""Every architecture against its slow twin, alone and through training, export and serving."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from turbolens_server.sae.bundle import Bundle, BundleError, Nesting, SaeWeights, load_bundle, save_bundle
from turbolens_server.sae.sae import Sae
from turbolens_server.sae.twin import decode_dense, encode_dense
from turbolens_training.sae import maths, twin
from turbolens_training.sae.architectures import build_architecture
from turbolens_training.sae.architectures.base import Export
from turbolens_training.sae.architectures.batch_topk import BatchTopK, batch_top_k
from turbolens_training.sae.architectures.jump_relu import JumpReLU, jump_relu
from turbolens_training.sae.architectures.matryoshka import Matryoshka
from turbolens_training.sae.architectures.topk import TopK
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.trainer import SaeTraining

CPU = torch.device("cpu")
D_MODEL, D_SAE = 6, 20
SMALL = SaeConfig(
    d_sae=64, k=4, steps=400, batch=64, warm_up=5, dead_tokens=2000, reservoir=512, tokens_per_image=8, images=4
)
VARIANTS = {
    "topk": SMALL,
    "batch-topk": dataclasses.replace(SMALL, architecture="batch-topk"),
    "jumprelu": dataclasses.replace(SMALL, architecture="jumprelu"),
    "matryoshka": dataclasses.replace(SMALL, architecture="matryoshka", nested_k=(2, 6), prefixes=(16, 32)),
}


def random_weights(seed: int, dtype: torch.dtype = torch.float64) -> SaeWeights:
    g = torch.Generator().manual_seed(seed)
    rows = functional.normalize(torch.randn(D_SAE, D_MODEL, generator=g, dtype=dtype), dim=1)
    encoder = torch.randn(D_MODEL, D_SAE, generator=g, dtype=dtype)
    biases = torch.randn(D_SAE, generator=g, dtype=dtype), torch.randn(D_MODEL, generator=g, dtype=dtype)
    return SaeWeights(encoder, biases[0], rows, biases[1], torch.rand(D_SAE, generator=g, dtype=dtype))


def random_pre(seed: int, positions: int = 7) -> torch.Tensor:
    return torch.randn(positions, D_SAE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SEEDS = st.integers(0, 2**31)


@given(SEEDS, st.integers(1, D_SAE), st.integers(1, 9))
def test_selections_are_those_of_their_slow_twins(seed: int, k: int, positions: int) -> None:
    pre, threshold = random_pre(seed, positions), random_weights(seed).threshold
    assert threshold is not None
    for active, expected in (
        (maths.top_k(pre, k), twin.top_k(pre, k)),
        (batch_top_k(pre, k), twin.batch_top_k(pre, k)),
        (jump_relu(pre, threshold, 0.3), twin.jump_relu(pre, threshold)),
    ):
        assert torch.equal(twin.dense(active, D_SAE), expected)
        assert torch.equal(active.counts(D_SAE), (expected > 0).sum(0))


def test_a_position_may_get_nothing() -> None:
    pre = torch.full((3, D_SAE), -1.0, dtype=torch.float64)
    pre[1, 4] = 2.0
    weights = random_weights(0)
    for active in (maths.top_k(pre, 2), batch_top_k(pre, 2), jump_relu(pre, torch.zeros(D_SAE).double(), 0.1)):
        z = twin.dense(active, D_SAE)
        assert z.nonzero().tolist() == [[1, 4]]
        assert torch.allclose(maths.decode(active, weights.W_dec), z @ weights.W_dec)


@given(SEEDS, st.integers(1, 5))
def test_encoder_and_decoder_are_those_of_their_slow_twins(seed: int, k: int) -> None:
    weights = random_weights(seed)
    x = torch.randn(5, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    pre = maths.pre_activations(weights, x)
    assert torch.allclose(pre, twin.pre_activations(weights, x))
    z = twin.top_k(pre, k)
    assert torch.allclose(maths.decode(maths.top_k(pre, k), weights.W_dec), z @ weights.W_dec)


@given(SEEDS)
def test_the_matryoshka_loss_is_that_of_its_slow_twin(seed: int) -> None:
    weights = random_weights(seed)
    x = torch.randn(5, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss = Matryoshka(3, (1, 5), (5, 10)).run(weights, x).loss
    assert loss.item() == pytest.approx(twin.matryoshka_loss(weights, x, 3, (1, 5), (5, 10)))


@given(SEEDS, st.floats(0.05, 2))
def test_thresholds_learn_by_the_straight_through_gradients(seed: int, bandwidth: float) -> None:
    """Equations 11 and 12 of the JumpReLU paper, through the whole loss: reconstruction and L0."""
    weights = random_weights(seed)
    x = torch.randn(5, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    threshold = weights.threshold
    assert threshold is not None
    architecture = JumpReLU(k=4, bandwidth=bandwidth, coefficient=0.3)
    architecture.run(dataclasses.replace(weights, threshold=threshold.requires_grad_()), x).loss.backward()

    threshold = threshold.detach()
    pre = twin.pre_activations(weights, x)
    z = twin.jump_relu(pre, threshold)
    of_values = 2 / x.numel() * (z @ weights.W_dec + weights.b_dec - x) @ weights.W_dec.T
    l0 = float((z > 0).sum()) / len(x)
    of_gates = torch.full_like(pre, 0.3 * 2 * (l0 / 4 - 1) / 4 / len(x))
    expected = twin.threshold_gradient(pre, threshold, of_values, of_gates, bandwidth)
    assert weights.threshold is not None
    assert weights.threshold.grad is not None
    assert torch.allclose(weights.threshold.grad, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "architecture",
    [JumpReLU(k=4, bandwidth=0.5, coefficient=1.0), TopK(4), BatchTopK(4), Matryoshka(4, (2, 6), (10,))],
    ids=lambda architecture: type(architecture).__name__,
)
def test_every_variant_starts_with_k_features_that_reconstruct_as_well_as_their_scale_lets_them(architecture) -> None:
    """Started too large, a JumpReLU's activations shrink past their thresholds, and the others lose steps."""
    tokens = torch.randn(500, D_MODEL, generator=torch.Generator().manual_seed(0))
    weights = architecture.initial_weights(tokens, D_SAE, torch.Generator().manual_seed(0))
    done = architecture.run(weights, tokens)
    assert done.active.counts(D_SAE).sum() / len(tokens) == pytest.approx(4, abs=0.1)
    made = tokens + done.error
    assert (tokens * made).sum() / made.square().sum() == pytest.approx(1, abs=0.01)


def test_batch_topk_selects_by_batch_in_training_and_by_threshold_when_served() -> None:
    architecture = BatchTopK(2)
    weights = architecture.initial_weights(torch.randn(50, D_MODEL), D_SAE, torch.Generator().manual_seed(0))
    smallest = []
    for seed in range(3):
        done = architecture.run(weights, torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(seed)))
        with torch.no_grad():
            architecture.observe(weights, done)
        smallest.append(done.active.values.min().item())
    export = architecture.export(weights)
    assert (export.architecture, export.k) == ("jumprelu", None)
    running = smallest[0]
    for value in smallest[1:]:
        running = 0.99 * running + 0.01 * value
    assert export.weights.threshold is not None
    assert torch.allclose(export.weights.threshold, torch.tensor(running))


class Source:
    """Tokens made of a few of many directions, off centre and far from unit scale."""

    identity = "sparse"

    def __init__(self) -> None:
        self.widths = {"a": 16}

    def tokens(self, index: int, per_image: int) -> dict[str, torch.Tensor]:
        directions = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
        g = torch.Generator().manual_seed(index)
        strength = 1 + torch.rand(20 * per_image, 3, 1, generator=g)
        return {"a": (strength * directions[torch.randint(40, (20 * per_image, 3), generator=g)]).sum(1) * 5 + 100}


@functools.cache
def trained(variant: str) -> Export:
    """A variant trained for a moment."""
    run = SaeTraining(VARIANTS[variant], Source(), CPU)
    run.train(SMALL.steps)
    return run.trainers["a"].export()


def bundled(export: Export, folder: Path) -> Bundle:
    """An export as the server reads it."""
    save_bundle(
        folder, hook_point="a", hook_module="a", model_name="m", model_hash="h", stats=None, provenance={},
        architecture=export.architecture, k=export.k, weights=export.weights, nesting=export.nesting,
    )  # fmt: skip
    return load_bundle(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_variant_is_served_and_explains_what_it_never_saw(variant: str, tmp_path: Path) -> None:
    bundle = bundled(trained(variant), tmp_path)
    sae = Sae(bundle, CPU)
    x = Source().tokens(10_000, 8)["a"]
    codes = sae.encode(x)
    z = encode_dense(bundle, x)
    served = torch.zeros_like(z).scatter(1, codes.indices, codes.values)
    assert torch.allclose(served, z, rtol=1e-4, atol=1e-3)
    assert torch.allclose(sae.decode(codes), decode_dense(bundle, z), rtol=1e-4, atol=1e-2)
    error = (x - sae.decode(codes)).square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.5
    l0 = (codes.values > 0).sum(1).float().mean().item()
    if bundle.k:
        assert (codes.values > 0).sum(1).max() <= bundle.k == SMALL.k
    else:
        assert l0 == pytest.approx(SMALL.k, rel=0.3)
    # By position: what one gets does not depend on the others.
    alone = sae.encode(x[:1]).values[0]
    assert torch.allclose(alone, codes.values[0, : len(alone)], rtol=1e-4, atol=1e-3)
    assert (bundle.weights.W_dec.norm(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "batch-topk"])
def test_training_and_serving_select_the_same(variant: str) -> None:
    """On folded weights; but for BatchTopK, whose selection by batch is not served."""
    export = trained(variant)
    x = Source().tokens(10_000, 8)["a"]
    pre = maths.pre_activations(export.weights, x)
    active = build_architecture(VARIANTS[variant]).encode(export.weights, pre)
    bundle = Bundle("a", "a", export.architecture, export.k, export.weights, None, "", None, {})
    assert torch.allclose(twin.dense(active, SMALL.d_sae), encode_dense(bundle, x), rtol=1e-4, atol=1e-3)


@given(SEEDS)
def test_reverse_weights_count_small_levels_most(seed: int) -> None:
    weights = random_weights(seed)
    x = torch.randn(5, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for ks, prefixes in (((1, 5), (5, 10)), ((1, 2, 5, 9), ()), ((), (5, 10))):
        architecture = Matryoshka(3, ks, prefixes, "reverse")
        loss = architecture.run(weights, x).loss.item()
        assert loss == pytest.approx(twin.matryoshka_loss(weights, x, 3, ks, prefixes, reverse=True))
    assert Matryoshka(4, (1, 2, 8), (), "reverse").shares() == pytest.approx([0.2, 0.4, 0.3, 0.1])  # k 4, 1, 2, 8


def test_a_matryoshka_is_served_at_any_k_and_every_prefix(tmp_path: Path) -> None:
    sae = Sae(bundled(trained("matryoshka"), tmp_path), CPU)
    x = Source().tokens(10_000, 8)["a"]
    errors = []
    for k in range(1, 7):
        codes = sae.encode(x, k=k)
        assert codes.values.shape[-1] == k
        errors.append((x - sae.decode(codes)).square().mean().item())
    assert errors[-1] < errors[0]
    w = sae.bundle.weights
    for prefix in (16, 32, 64):
        codes = sae.encode(x, prefix=prefix)
        assert codes.indices.max() < prefix
        # A prefix is an SAE of its own.
        cut = SaeWeights(w.W_enc[:, :prefix], w.b_enc[:prefix], w.W_dec[:prefix], w.b_dec)
        alone = Sae(dataclasses.replace(sae.bundle, weights=cut, nesting=None), CPU).encode(x)
        assert torch.allclose(alone.values, codes.values, rtol=1e-4, atol=1e-3)
    cases = ({"k": 7}, "k=7: .* allows 1 to 6"), ({"k": 0}, "k=0"), ({"prefix": 20}, "allows 16, 32, 64")
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            sae.encode(x, **wrong)


@pytest.mark.parametrize(
    ("change", "nesting"), [({"nested_k": ()}, Nesting(4, (16, 32, 64))), ({"prefixes": ()}, Nesting(6, (64,)))]
)
def test_a_matryoshka_may_be_of_prefixes_or_of_several_k_alone(change: dict, nesting: Nesting, tmp_path: Path) -> None:
    run = SaeTraining(dataclasses.replace(VARIANTS["matryoshka"], steps=2, **change), Source(), CPU)
    run.train(2)
    assert bundled(run.trainers["a"].export(), tmp_path).nesting == nesting


def test_other_saes_have_one_k_and_one_width() -> None:
    sae = Sae(_bundle("topk", 3), CPU)
    x = torch.randn(2, D_MODEL)
    assert sae.encode(x, k=3, prefix=D_SAE).values.shape == (2, 3)
    for wrong in ({"k": 2}, {"prefix": 10}):
        with pytest.raises(ValueError, match="allows only"):
            sae.encode(x, **wrong)


def _bundle(architecture, k):
    weights = dataclasses.replace(random_weights(0, torch.float32), threshold=None)
    return Bundle("b", "b", architecture, k, weights, None, "", None, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_max": 3}, "k_max=3, expected 4 to 64"),
        ({"k_max": "6"}, "k_max='6'"),
        ({"prefixes": [16, 32]}, "prefixes"),
        ({"prefixes": [32, 16, 64]}, "prefixes"),
        ({"prefixes": [2, 64]}, "prefixes"),
        ({"prefixes": []}, "prefixes"),
        ({"prefixes": None}, "prefixes"),
        ({"prefixes": [16, "32", 64]}, "prefixes"),
    ],
)
def test_a_malformed_nesting_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    weights = SaeWeights(torch.randn(4, 64), torch.randn(64), torch.randn(64, 4), torch.randn(4))
    save_bundle(
        tmp_path, hook_point="a", hook_module="a", model_name="m", model_hash="h", stats=None, provenance={},
        architecture="turbolens-matryoshka", k=4, weights=weights, nesting=Nesting(6, (16, 64)),
    )  # fmt: skip
    assert load_bundle(tmp_path).nesting == Nesting(6, (16, 64))
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(BundleError, match=message):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k=0, expected at least 1"),
        ({"k": 2000}, f"k=2000, expected 1 to d_sae={SaeConfig.d_sae}"),
        ({"bandwidth": 0.1}, "bandwidth is a setting of architecture jumprelu"),
        ({"architecture": "matryoshka", "prefixes": (256, 64)}, "prefixes"),
        ({"architecture": "matryoshka", "prefixes": (8, 64)}, "prefixes"),
        ({"architecture": "matryoshka", "nested_k": (0, 4)}, "nested_k"),
        ({"architecture": "matryoshka", "nested_k": (), "prefixes": (8, 64)}, "prefixes"),
        ({"held_out_chunks": 0}, "held_out_chunks=0, expected at least 1"),
        ({"checkpoint_steps": 0}, "checkpoint_steps=0, expected at least 1"),
        ({"multi_steps": ()}, "multi_steps: none, expected one or more where one_step_share=0.7"),
        ({"multi_steps": (0, 4)}, r"multi_steps=\(0, 4\), expected at least 1"),
        ({"one_step_share": 1.5}, "one_step_share=1.5, expected 0 to 1"),
        ({"images": 0}, "images=0, expected at least 1"),
        ({"reservoir": 100}, "reservoir=100, expected at least batch"),
        ({"run_steps": 3}, "run_steps is a setting of architecture temporal"),
        ({"architecture": "temporal", "run_steps": 1}, "run_steps=1, expected at least 2"),
        ({"architecture": "temporal", "one_step_share": 0.5}, "one_step_share does nothing for a temporal"),
        ({"architecture": "temporal", "multi_steps": (4,)}, "multi_steps does nothing for a temporal"),
    ],
)
def test_a_setting_that_cannot_be_or_does_nothing_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SaeConfig(**change)
