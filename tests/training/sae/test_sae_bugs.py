"""Mistakes that SAE trainers are known to have made; each test fails once its mistake is put in.

Where another file's test is the one that fails, the table says so.

| mistake | test |
| --- | --- |
| AuxK's target with its sign turned | test_auxk_teaches_the_dead_what_the_strongest_leave_over |
| b_dec counted twice in AuxK, or not at all | the same |
| AuxK's target not detached: live features feel it | test_auxk_moves_dead_features_only |
| another number of dead features in AuxK than asked | test_sae_auxk: test_auxk_is_the_share_... |
| a share of AuxK so small that it means the published mode | test_a_share_of_auxk_that_rounds_to_no_place_... |
| the normaliser's fold forgets b_dec, b_enc or a threshold | test_folding_is_exact_for_every_architecture |
| reconstruction compared with something else than x | test_a_perfect_sae_has_no_loss |
| the loss scaled by the batch's own variance | test_the_loss_does_not_depend_on_the_batchs_own_variance |
| explained variance as a mean of ratios, or around zero | evaluation/test_quality: test_explained_variance_... |
| TopK served as ReLU | test_a_topk_that_keeps_more_than_k_is_not_measured |
| BatchTopK served as TopK, or without its threshold | test_sae_architectures: test_batch_topk_selects_... |
| decoder rows that drift from unit norm | test_sae_maths: test_rows_are_unit_after_every_step |
| the gradient along a row not removed | test_sae_maths: test_the_gradient_along_a_row_is_removed |
| a resumed run that starts anew, or lacks a part of its state | test_sae_trainer: test_a_run_resumed_... |
| a threshold that is no part of the state | test_every_architectures_state_is_whole |
| a setting that nothing reads | test_every_setting_is_read |
| metrics that move the dead clock or the weights | test_looking_changes_nothing |
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import turbolens_training
from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.sae.sae import Codes, Sae
from turbolens_server.sae.twin import decode_dense, encode_dense
from turbolens_training.activations.stream import Updates
from turbolens_training.measures.quality import measure
from turbolens_training.sae import auxk, maths, twin
from turbolens_training.sae.architectures import build_architecture
from turbolens_training.sae.architectures.batch_topk import batch_top_k
from turbolens_training.sae.architectures.topk import TopK
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.normalizer import Normalizer
from turbolens_training.sae.trainer import SaeTrainer, SaeTraining

CPU = torch.device("cpu")
D_MODEL, D_SAE, K = 8, 24, 4
CONFIG = SaeConfig(d_sae=D_SAE, k=K, steps=100, batch=32, warm_up=1, dead_tokens=64, reservoir=64)
VARIANTS = [
    CONFIG,
    dataclasses.replace(CONFIG, architecture="batch-topk"),
    dataclasses.replace(CONFIG, architecture="jumprelu"),
    dataclasses.replace(CONFIG, architecture="matryoshka", nested_k=(2, 6), prefixes=(8, 16)),
]


def random_weights(seed: int) -> SaeWeights:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = torch.nn.functional.normalize(draw(D_SAE, D_MODEL), dim=1)
    return SaeWeights(draw(D_MODEL, D_SAE), draw(D_SAE), rows, draw(D_MODEL))


def random_tokens(seed: int, n: int = 40) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 2**31), st.integers(0, K))
def test_auxk_teaches_the_dead_what_the_strongest_leave_over(seed: int, strongest: int) -> None:
    weights, x = random_weights(seed), random_tokens(seed)
    pre = maths.pre_activations(weights, x)
    expected = twin.auxk_target(weights, x, strongest)
    for active in (maths.top_k(pre, K), batch_top_k(pre, K)):
        target = auxk.auxk_target(weights, x, auxk.strongest(pre, active, strongest))
        assert torch.allclose(target, expected)
    # What they learn, added to the reconstruction by the strongest, is x.
    z = twin.top_k(twin.pre_activations(weights, x), strongest)
    assert torch.allclose(target + z @ weights.W_dec + weights.b_dec, x)


def test_auxk_moves_dead_features_only() -> None:
    """Live features learn the same whether the dead learn or not."""
    x = random_tokens(1, 200).float()
    normalizer = Normalizer.fit(x)
    config = dataclasses.replace(CONFIG, auxk_coefficient=100.0)
    moved = SaeTrainer(config, x, 0, normalizer)
    still = SaeTrainer(dataclasses.replace(config, auxk_coefficient=0.0), x, 0, normalizer)
    dead = torch.arange(5)
    for trainer in (moved, still):
        state = trainer.state_dict()
        state["idle"][dead] = CONFIG.dead_tokens
        trainer.load_state_dict(state | {"dead": dead})
    gradients = []
    for trainer in (moved, still):
        trainer.step(x[:32], 30)
        gradients.append({name: tensor.grad for name, tensor in trainer.weights.tensors().items()})
    live = torch.ones(D_SAE, dtype=torch.bool)
    live[dead] = False

    def direction(gradient: torch.Tensor) -> torch.Tensor:
        return gradient / gradient.norm()  # clipping scales both runs by another number

    for name, of_live in (("W_dec", lambda t: t[live]), ("W_enc", lambda t: t[:, live]), ("b_enc", lambda t: t[live])):
        with_aux, without = (of_live(g[name]) for g in gradients)
        assert torch.allclose(direction(with_aux), direction(without), atol=1e-5)
    assert not torch.allclose(moved.weights.W_dec[dead], still.weights.W_dec[dead])


@pytest.mark.parametrize(("k", "share", "as_of"), [(1, 0.5, 1.0), (4, 0.01, 0.25), (4, 1e-9, 0.25)])
def test_a_share_of_auxk_that_rounds_to_no_place_is_one_place_and_not_the_published_mode(
    k: int, share: float, as_of: float
) -> None:
    x = random_tokens(1, 200).float()

    def learnt(share: float) -> torch.Tensor:
        trainer = SaeTrainer(dataclasses.replace(CONFIG, k=k, auxk_share=share), x, 0, Normalizer.fit(x))
        dead = torch.arange(5)
        state = trainer.state_dict()
        state["idle"][dead] = CONFIG.dead_tokens
        trainer.load_state_dict(state | {"dead": dead})
        trainer.step(x[:32], 30)
        return trainer.weights.W_dec.detach()

    assert torch.equal(learnt(share), learnt(as_of))
    assert not torch.equal(learnt(share), learnt(0.0))


@given(st.integers(0, 2**31), st.sampled_from(VARIANTS), st.floats(0.01, 100), st.floats(-50, 50))
def test_folding_is_exact_for_every_architecture(seed: int, config: SaeConfig, scale: float, offset: float) -> None:
    """The served SAE on x does what the trained one does on the normalised x."""
    g = torch.Generator().manual_seed(seed)
    architecture = build_architecture(config)
    weights = architecture.initial_weights(torch.randn(64, D_MODEL, generator=g), D_SAE, g)
    threshold = None if weights.threshold is None else torch.rand(D_SAE, generator=g)
    biases = torch.randn(D_SAE, generator=g) * 0.1, torch.randn(D_MODEL, generator=g)
    weights = SaeWeights(weights.W_enc, biases[0], weights.W_dec, biases[1], threshold)
    normalizer = Normalizer(torch.randn(D_MODEL, generator=g) + offset, scale)
    normal = torch.randn(20, D_MODEL, generator=g)
    trained = _as_bundle(config, weights)
    served = _as_bundle(config, normalizer.fold(weights))
    x = normal * scale + normalizer.mean
    trained_z, served_z = encode_dense(trained, normal), encode_dense(served, x)
    slack = 1e-5 * (1 + abs(offset) / scale) * (1 + trained_z.max())
    # A value within rounding of a threshold or of the k-th may fall on the other side; then its whole row is off.
    same = ((served_z / scale - trained_z).abs() < slack).all(1)
    assert same.float().mean() > 0.7
    expected = decode_dense(trained, trained_z) * scale + normalizer.mean
    error = (decode_dense(served, served_z) - expected).abs() / scale
    assert (error[same] < 20 * slack).all()


def _as_bundle(config: SaeConfig, weights: SaeWeights) -> Bundle:
    export = build_architecture(config).export(weights)
    return Bundle("b", "b", export.architecture, export.k, export.weights, None, "", None, {})


def test_a_perfect_sae_has_no_loss() -> None:
    """x is compared with its reconstruction, both with b_dec: no constant is left over."""
    eye = torch.eye(D_MODEL, dtype=torch.float64)
    encoder, rows = torch.cat([eye, -eye], 1), torch.cat([eye, -eye])
    weights = SaeWeights(encoder, torch.zeros(2 * D_MODEL).double(), rows, torch.full((D_MODEL,), 3.0).double())
    done = TopK(D_MODEL).run(weights, random_tokens(0))
    assert done.loss.item() < 1e-12


def test_the_loss_does_not_depend_on_the_batchs_own_variance() -> None:
    x, y = random_tokens(0), random_tokens(1)
    assert maths.reconstruction_loss(x, y).item() == pytest.approx(twin.fvu(x, y))
    small = maths.reconstruction_loss(0.1 * x, 0.1 * y).item()
    assert small == pytest.approx(0.01 * maths.reconstruction_loss(x, y).item())


class _AsReLU(Sae):
    """A TopK that lost its k on the way."""

    def encode(self, x: torch.Tensor, *, k: int | None = None, prefix: int | None = None) -> Codes:
        values, indices = torch.addmm(self.bias, x, self.W_enc).sort(1, descending=True)
        return Codes(values.relu(), indices)


@pytest.mark.parametrize("architecture", ["topk", "turbolens-matryoshka"])
def test_a_topk_that_keeps_more_than_k_is_not_measured(architecture: Any) -> None:
    weights = SaeWeights(**{name: tensor.float() for name, tensor in random_weights(0).tensors().items()})
    bundle = Bundle("a", "a", architecture, K, weights, None, "", None, {})
    x = random_tokens(0).float()
    updates = Updates(("",), (0,), torch.zeros(1), (999,), {"a": x[None, None]})
    found = measure({"a": Sae(bundle, CPU)}, [updates])["a"]
    assert found.rows("a", dead=0.0)[0]["l0_p99"] <= K
    with pytest.raises(AssertionError, match="more than k=4"):
        measure({"a": _AsReLU(bundle, CPU)}, [updates])


class Source:
    """Gaussian tokens."""

    identity = "gaussian"

    def __init__(self) -> None:
        self.widths = {"a": D_MODEL}

    def tokens(self, index: int, per_image: int) -> dict[str, torch.Tensor]:
        return {"a": random_tokens(index, 32).float()}


@pytest.mark.parametrize(
    "config",
    [*VARIANTS, dataclasses.replace(CONFIG, architecture="temporal", run_steps=4)],
    ids=lambda config: config.architecture,
)
def test_every_architectures_state_is_whole(config: SaeConfig, tmp_path: Path) -> None:
    """Bit-equal after a stop, thresholds included."""
    whole, first, second = (SaeTraining(config, Source(), CPU) for _ in range(3))
    whole.train(14)
    first.train(9, checkpoint=tmp_path / "state.pt")
    second.resume(tmp_path / "state.pt")
    second.train(14)
    ours, theirs = (run.trainers["a"].export().weights.tensors() for run in (whole, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_looking_changes_nothing() -> None:
    run = SaeTraining(CONFIG, Source(), CPU)
    run.train(5)
    trainer = run.trainers["a"]
    before = _copy(run.state_dict())
    trainer.progress()
    trainer.export()
    run.state_dict()
    assert _equal(before, run.state_dict())


def _copy(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.clone()
    return {key: _copy(value) for key, value in state.items()} if isinstance(state, dict) else state


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def test_every_setting_is_read() -> None:
    """By an attribute access somewhere in the package; what `__post_init__` reads to check it does not count."""
    package = Path(inspect.getfile(turbolens_training)).parent
    read = set()
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        checks = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute)
            if (
                named
                and id(node) not in checks
                and ast.unparse(node.value) in ("config", "self.config", "run.config", "self")
            ):
                read.add(node.attr)
    assert {field.name for field in dataclasses.fields(SaeConfig)} <= read
