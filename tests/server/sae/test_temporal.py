"""The temporal SAE's algebra against its slow twin, what its bundles must hold, and what it does in an engine."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.info import SaeInfo
from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.plan import BatchPlan
from turbolens_server.engine.tap import StepTap
from turbolens_server.engine.types import FeaturesReady, Job
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.bundle import Bundle, BundleError, FeatureStats, SaeWeights, load_bundle, save_bundle
from turbolens_server.sae.sae import Sae
from turbolens_server.sae.temporal import by_step, changes, side_by_side
from turbolens_server.sae.twin import decode_run_dense, encode_run_dense, steer_run_dense
from turbolens_server.steering.compose import compose
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import Box, BoxMask
from turbolens_server.steering.resolve import ResolvedEdit
from turbolens_server.unet.torch_unet import TorchUNet

CPU = torch.device("cpu")
STEPS, POSITIONS, D_MODEL, D_SAE, K = 3, 6, 8, 30, 4
SEEDS = st.integers(0, 2**31)


def make_bundle(seed: int, *, d_model: int = D_MODEL, steps: int = STEPS, name: str = "mid.0") -> Bundle:
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, steps * d_model, generator=g), dim=1)
    weights = SaeWeights(
        W_dec.T.contiguous() + 0.1 * torch.randn(steps * d_model, D_SAE, generator=g),
        0.1 * torch.randn(D_SAE, generator=g),
        W_dec,
        torch.randn(steps * d_model, generator=g),
        scales=torch.rand(steps, generator=g) + 0.1,
        predictors=torch.randn(steps - 1, d_model, d_model, generator=g) / d_model**0.5 if seed % 2 else None,
    )
    ones = np.ones(D_SAE, np.float32)
    stats = FeatureStats(2 * ones, 4 * ones, 0.1 * ones, np.array([999, 499]), np.array([3, 5], np.float32))
    return Bundle(name, name, "turbolens-temporal", K, weights, stats, "hash", None, {})


def make_updates(seed: int, positions: int = POSITIONS) -> torch.Tensor:
    return 3 * torch.randn(STEPS, positions, D_MODEL, generator=torch.Generator().manual_seed(seed))


# The algebra


@given(SEEDS, st.integers(1, 9))
def test_encoding_and_decoding_are_those_of_the_slow_twins(seed: int, positions: int) -> None:
    bundle, updates = make_bundle(seed), make_updates(seed, positions)
    sae = Sae(bundle, CPU)
    codes = sae.encode(side_by_side(updates))
    assert codes.values.shape == (positions, K)
    dense = torch.zeros(positions, D_SAE).scatter_add(-1, codes.indices, codes.values)
    assert torch.allclose(dense, encode_run_dense(bundle, updates), atol=1e-4)
    made = by_step(sae.decode(codes), STEPS)
    assert torch.allclose(made, decode_run_dense(bundle, dense), atol=1e-4)


@given(SEEDS, st.integers(1, 9), st.floats(0, 8))
def test_above_a_threshold_encoding_is_that_of_the_slow_twin(seed: int, positions: int, threshold: float) -> None:
    bundle, updates = make_bundle(seed), make_updates(seed, positions)
    weights = dataclasses.replace(bundle.weights, threshold=torch.full((D_SAE,), threshold))
    bundle = dataclasses.replace(bundle, k=None, weights=weights)
    codes = Sae(bundle, CPU).encode(side_by_side(updates))
    dense = torch.zeros(positions, D_SAE).scatter_add(-1, codes.indices, codes.values)
    slow = encode_run_dense(bundle, updates)
    near = ((slow - threshold).abs() < 1e-4) | ((dense - threshold).abs() < 1e-4)  # a rounding decides
    assert torch.allclose(dense.masked_fill(near, 0), slow.masked_fill(near, 0), atol=1e-4)
    alone = Sae(bundle, CPU).encode(side_by_side(updates[:, :1]))  # nothing depends on its mates
    assert torch.allclose(alone.values.sum(), codes.values[0].sum(), atol=1e-3)


@given(SEEDS)
def test_changes_are_since_the_step_before_in_the_units_of_the_steps(seed: int) -> None:
    updates, scales = make_updates(seed), make_bundle(seed).weights.scales
    assert scales is not None
    assert torch.equal(by_step(side_by_side(updates), STEPS), updates)
    y = by_step(changes(side_by_side(updates), scales), STEPS)
    assert torch.allclose(y[0] * scales[0], updates[0], atol=1e-5)
    assert torch.allclose((y * scales[:, None, None]).cumsum(0), updates, atol=1e-4)


def steer(x: torch.Tensor, edits: list[ResolvedEdit], W_dec: torch.Tensor) -> torch.Tensor:
    """One picture's update [P, d] with edits that ask for no activation."""
    row = compose(edits, len(x))
    assert not row.closed
    return row.gain[:, None] * x + row.shift.T @ W_dec[row.features]


@st.composite
def edits_by_step(draw) -> list[list[ResolvedEdit]]:
    """Up to three `add` and one `replace` at every step."""
    found = []
    for _ in range(STEPS):
        kinds = ["add"] * draw(st.integers(0, 3)) + ["replace"] * draw(st.integers(0, 1))
        edits = []
        for kind in draw(st.permutations(kinds)):
            features = draw(st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=3, unique=True))
            amounts = draw(st.lists(st.floats(-9, 9, width=32), min_size=len(features), max_size=len(features)))
            mask = draw(st.lists(st.floats(0, 1, width=32), min_size=POSITIONS, max_size=POSITIONS))
            edits.append(ResolvedEdit(kind, torch.tensor(features), torch.tensor(amounts), torch.tensor(mask)))
        found.append(edits)
    return found


@given(edits_by_step(), SEEDS)
def test_steering_is_that_of_the_slow_twin(edits: list[list[ResolvedEdit]], seed: int) -> None:
    bundle, updates = make_bundle(seed), make_updates(seed)
    sae = Sae(bundle, CPU)
    expected = steer_run_dense(bundle, updates, edits)
    for step, update in enumerate(updates):
        assert torch.allclose(steer(update, edits[step], sae.directions(step)), expected[step], atol=1e-3)


@given(SEEDS, st.integers(0, D_SAE - 1), st.floats(-9, 9, width=32))
def test_to_add_a_feature_is_to_decode_more_of_it_and_the_rest_cancels(seed: int, feature: int, amount: float) -> None:
    """At every step; what the SAE does not explain stays as it is."""
    bundle, updates = make_bundle(seed), make_updates(seed)
    sae, z = Sae(bundle, CPU), encode_run_dense(bundle, updates)
    more = z.clone()
    more[:, feature] += amount
    moved = decode_run_dense(bundle, more) - decode_run_dense(bundle, z)
    edit = ResolvedEdit("add", torch.tensor([feature]), torch.tensor([amount]), torch.ones(POSITIONS))
    for step, update in enumerate(updates):
        assert torch.allclose(steer(update, [edit], sae.directions(step)) - update, moved[step], atol=1e-3)


def test_a_run_of_another_length_is_no_input() -> None:
    sae = Sae(make_bundle(0), CPU)
    with pytest.raises(ValueError, match=r"mid\.0 reads 24 dimensions, the updates of 3 steps side by side, not 8"):
        sae.encode(torch.zeros(5, D_MODEL))


# Bundles


def write(bundle: Bundle, folder: Path, *, hook_module: str = "m", model_hash: str = "h") -> Path:
    save_bundle(
        folder, hook_point=bundle.hook_point, hook_module=hook_module, model_name="m", model_hash=model_hash,
        architecture=bundle.architecture, k=bundle.k, weights=bundle.weights, stats=bundle.stats, provenance={},
    )  # fmt: skip
    return folder


def test_a_bundle_is_read_as_it_was_written(tmp_path: Path) -> None:
    bundle = make_bundle(1)
    read = load_bundle(write(bundle, tmp_path))
    assert (read.architecture, read.steps, read.k) == ("turbolens-temporal", STEPS, K)
    assert (read.d_in, read.d_model, read.d_sae) == (STEPS * D_MODEL, D_MODEL, D_SAE)
    for name, tensor in bundle.weights.tensors().items():
        assert torch.equal(tensor, read.weights.tensors()[name])
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["steps"], config["d_in"]) == ("turbolens-temporal", STEPS, STEPS * D_MODEL)


def test_a_bundle_with_a_threshold_is_read_as_it_was_written(tmp_path: Path) -> None:
    bundle = make_bundle(1)
    weights = dataclasses.replace(bundle.weights, threshold=torch.rand(D_SAE))
    read = load_bundle(write(dataclasses.replace(bundle, k=None, weights=weights), tmp_path))
    assert (read.architecture, read.steps, read.k) == ("turbolens-temporal", STEPS, None)
    assert read.weights.threshold is not None
    assert torch.equal(read.weights.threshold, weights.threshold)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"steps": 4}, {}, "steps=4, expected 3"),
        ({"steps": None}, {}, "steps=None, expected 3"),
        ({"steps": "3"}, {}, "steps='3'"),
        ({"k": 0}, {}, "k=0"),
        ({"architecture": "topk"}, {}, "'scales'"),
        ({"architecture": "turbolens-other"}, {}, "served are"),
        ({}, {"scales": None}, "expected .*'scales'"),
        ({}, {"threshold": torch.zeros(D_SAE)}, "k=4 beside a threshold"),
        ({"k": None}, {"threshold": torch.zeros(3)}, r"threshold has shape \(3,\), expected \(30,\)"),
        ({"k": None}, {}, "k=None, expected 1 to 30"),
        ({"steps": 5}, {"scales": torch.ones(5)}, "5 steps, expected at least 2 that divide d_in=24"),
        ({"steps": 1}, {"scales": torch.ones(1)}, "1 steps, expected at least 2"),
        ({}, {"scales": torch.tensor([1.0, 0.0, 1.0])}, "scales holds values that are not positive"),
        ({}, {"scales": torch.tensor([1.0, torch.nan, 1.0])}, "scales holds values that are not finite"),
        ({}, {"predictors": torch.zeros(3, 8, 8)}, r"predictors has shape \(3, 8, 8\), expected \(2, 8, 8\)"),
        ({}, {"scales": torch.ones(3, 1)}, r"scales has shape \(3, 1\)"),
        ({}, {"scales": torch.tensor(1.0)}, r"scales has shape \(\)"),
        ({}, {"W_enc": torch.ones(STEPS, D_MODEL, D_SAE)}, r"W_enc has shape \(3, 8, 30\), expected \(d_in, d_sae\)"),
        ({}, {"W_dec": torch.ones(STEPS, D_SAE, D_MODEL)}, "W_dec has shape"),
        ({}, {"b_dec": torch.ones(D_MODEL)}, "b_dec has shape"),
    ],
)
def test_a_malformed_bundle_is_refused_with_one_line(tmp_path: Path, config: dict, tensors: dict, message: str) -> None:
    write(make_bundle(1), tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    changed = load_file(tmp_path / "sae_weights.safetensors") | tensors
    save_file({n: t for n, t in changed.items() if t is not None}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(BundleError, match=message) as caught:
        load_bundle(tmp_path)
    assert "\n" not in str(caught.value)


# In an engine

MASK = BoxMask((Box(0, 0, 0.5, 1),))


@pytest.fixture(scope="module")
def temporal_engine(engine: Engine) -> Engine:
    """The embedded model with its own SAEs, but for a temporal one at mid.0."""
    bundle = make_bundle(3, d_model=128)
    infos = {**engine.info.saes, "mid.0": SaeInfo("mid.0", "mid.0", bundle, False)}
    info = dataclasses.replace(engine.info, saes=infos)
    return Engine(engine.components, TorchUNet(engine.components.unet), info, CPU)


def edit(kind: str, amount: float, *, unit: Unit = Unit.RAW, **more) -> Edit:
    return Edit(kind, (WeightedFeature("mid.0", 5), WeightedFeature("mid.0", 9, 0.5)), amount, unit, **more)


def job(engine: Engine, seed: int = 7, steps: int = STEPS, **more) -> Job:
    return Job("a big red star", seed, steps, *engine.info.default_size, **more)


def plan_of(engine: Engine, *jobs: Job) -> BatchPlan:
    return BatchPlan(jobs, Lanes.of(jobs), engine.info, engine.saes, CPU, [999.0, 666.0, 499.0])


def test_the_tap_moves_an_update_by_the_direction_of_its_step(temporal_engine: Engine) -> None:
    edits = (
        edit("add", 1.0, unit=Unit.NORM, mask=MASK, steps=(1, 3)),
        edit("replace", 3.0, unit=Unit.MEAN, steps=(2, 3)),
    )
    plan, sae = plan_of(temporal_engine, job(temporal_engine, edits=edits), job(temporal_engine)), None
    sae = temporal_engine.saes["mid.0"]
    update, left = torch.randn(2, 64, 128), torch.from_numpy(MASK.on_grid(8, 8)).flatten()[:, None]
    assert StepTap(plan, 0).at == frozenset()
    for step, norm in ((1, 5.0), (2, 5.0)):  # of the timesteps measured, 499 is nearest to 666
        tap = StepTap(plan, step)
        moved = tap("mid.0", update, (8, 8))
        row = sae.directions(step)[5] + 0.5 * sae.directions(step)[9]
        base = update[0] if step == 1 else 3.0 * 2.0 * row
        assert torch.allclose(moved[0], base + left * norm * row, atol=1e-4)
        assert torch.equal(moved[1], update[1])
        gain, bias = tap.affine("mid.0", (8, 8)) or ()
        as_graph = gain.flatten(2).transpose(1, 2) * update + bias.flatten(2).transpose(1, 2)
        assert torch.allclose(as_graph, moved, atol=1e-4)


def test_codes_come_once_after_the_last_step_and_are_those_of_the_updates_before_the_edits(
    temporal_engine: Engine,
) -> None:
    wanted = ("mid.0", "up.0.1")
    jobs = [job(temporal_engine), job(temporal_engine, saes=wanted, edits=(edit("add", 5.0),))]
    jobs.append(job(temporal_engine, seed=8, saes=wanted))
    plan, updates = plan_of(temporal_engine, *jobs), torch.randn(STEPS, 3, 64, 128)
    for step in range(STEPS):
        tap = StepTap(plan, step)
        tap("mid.0", updates[step].clone(), (8, 8)) if step != 1 else tap.read("mid.0", updates[step].clone(), (8, 8))
        found = list(tap.collect())
        assert len(found) == (2 if step == STEPS - 1 else 0)
    codes = temporal_engine.saes["mid.0"].encode(side_by_side(updates))
    for (row, served), expected in zip(found, (1, 2), strict=True):
        assert (row, served.sae, served.step) == (expected, "mid.0", STEPS - 1)
        active = codes.values[row] > 0
        assert np.array_equal(served.counts, active.sum(1).numpy())
        assert np.allclose(served.values, codes.values[row][active].numpy(), atol=1e-5)


def test_the_engine_serves_it_beside_the_others(temporal_engine: Engine) -> None:
    events: list[FeaturesReady] = []
    jobs = [job(temporal_engine, saes=("mid.0", "up.0.1")), job(temporal_engine, edits=(edit("add", 40.0),))]
    plain, steered = temporal_engine.run(
        jobs, on_event=lambda e: events.append(e) if isinstance(e, FeaturesReady) else None
    )
    assert plain is not None
    assert steered is not None
    assert [(e.codes.sae, e.codes.step) for e in events] == [("up.0.1", 0), ("up.0.1", 1), ("mid.0", 2), ("up.0.1", 2)]
    mid = next(codes for codes in plain.features if codes.sae == "mid.0")
    assert 0 < mid.counts.max() <= K
    assert not np.allclose(plain.latents, steered.latents, atol=1e-2)
    temporal_engine.warm_up(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"saes": ("mid.0",), "steps": 2}, "mid.0 serves runs of 3 steps alone"),
        ({"edits": (edit("add", 1.0),), "steps": 1}, "mid.0 serves runs of 3 steps alone"),
        ({"edits": (edit("scale", 0.0),)}, "scale needs activations .* mid.0 .* takes add and replace"),
        ({"edits": (edit("set", 1.0),)}, "set needs activations"),
        ({"edits": (edit("add", 1.0, reference="o"),)}, "add in the unit of a reference needs activations"),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_first_step(
    temporal_engine: Engine, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(temporal_engine, job(temporal_engine, **changes))


def test_an_sae_of_another_width_or_of_more_steps_than_are_served_is_not_loaded(
    small_model: tuple[Path, Path], tmp_path: Path
) -> None:
    model = str(small_model[0])
    for d_model, max_steps, message in (
        (32, 4, "SAE mid.0: reads 32 dimensions, mid.0 has 64"),
        (64, 2, "SAE mid.0: serves runs of 3 steps alone, and requests may have 2; raise --max-steps"),
    ):
        folder = write(make_bundle(0, d_model=d_model), tmp_path / str(d_model))
        with pytest.raises(LoadError, match=re.escape(message)):
            load_engine(model=model, device="cpu", saes=[str(folder)], force_sae=True, max_steps=max_steps)
