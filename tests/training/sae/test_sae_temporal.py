"""The temporal architecture against its slow twin, in training, and from the command line to a served picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import turbolens as tl
from turbolens_server.catalog.labels import read_labels
from turbolens_server.sae.bundle import Bundle, SaeWeights, load_bundle
from turbolens_server.sae.sae import Sae
from turbolens_server.sae.temporal import by_step, side_by_side
from turbolens_server.sae.twin import encode_run_dense
from turbolens_training import cli
from turbolens_training.activations.cache import ShardCache
from turbolens_training.activations.cached import CachedStream
from turbolens_training.activations.stream import SceneStream
from turbolens_training.activations.temporal import TemporalSource, sample_temporal
from turbolens_training.catalog import cli as catalog
from turbolens_training.measures.quality import measure
from turbolens_training.sae import twin
from turbolens_training.sae.architectures.batch_topk import BatchTopK
from turbolens_training.sae.architectures.temporal import RIDGE, Temporal
from turbolens_training.sae.architectures.topk import TopK
from turbolens_training.sae.config import Prediction, SaeConfig
from turbolens_training.sae.normalizer import Normalizer
from turbolens_training.sae.trainer import SaeTrainer, SaeTraining

CPU = torch.device("cpu")
STEPS, D_MODEL, D_SAE, K = 3, 6, 24, 4
SEEDS = st.integers(0, 2**31)
CONFIG = SaeConfig(
    architecture="temporal", run_steps=STEPS, d_sae=64, k=4, steps=400, batch=64, warm_up=5, dead_tokens=2000,
    reservoir=512, tokens_per_image=8, images=4, steps_per_chunk=3,
)  # fmt: skip


def random_updates(seed: int, n: int = 7) -> torch.Tensor:
    """[T, N, d_model], of which the later steps change less and less."""
    g = torch.Generator().manual_seed(seed)
    changed = torch.randn(STEPS, n, D_MODEL, generator=g, dtype=torch.float64)
    return (changed * torch.tensor([5.0, 0.5, 0.1])[:, None, None]).cumsum(0)


def random_weights(seed: int) -> SaeWeights:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = functional.normalize(draw(D_SAE, STEPS * D_MODEL), dim=1)
    scales = torch.rand(STEPS, generator=g, dtype=torch.float64) + 0.1
    predictors = draw(STEPS - 1, D_MODEL, D_MODEL) / D_MODEL**0.5 if seed % 2 else None
    return SaeWeights(
        draw(STEPS * D_MODEL, D_SAE), draw(D_SAE), rows, draw(STEPS * D_MODEL), scales=scales, predictors=predictors
    )


@given(SEEDS, st.integers(1, 9))
def test_the_loss_is_that_of_the_slow_twin(seed: int, k: int) -> None:
    weights, updates = random_weights(seed), random_updates(seed)
    architecture = Temporal(TopK(k), STEPS)
    done = architecture.run(weights, architecture.read(weights, torch.cat([*updates], 1)))
    assert done.loss.item() == pytest.approx(twin.temporal_loss(weights, updates, k))


def test_ridge_predictors_are_those_of_the_normal_equations_and_leave_what_they_cannot_expect() -> None:
    """One step is a matrix of the one before and noise that nothing tells: the matrix is found, the noise is left."""
    g = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, 4000, D_MODEL, generator=g)
    matrix = torch.randn(D_MODEL, D_MODEL, generator=g)
    x = torch.cat([first, first @ matrix + 0.01 * noise], 1)
    x = x - x.mean(0)
    weights = Temporal(TopK(K), 2, "ridge").initial_weights(x, D_SAE, torch.Generator().manual_seed(0))
    assert weights.predictors is not None
    (found,) = weights.predictors
    before, after = x[:, :D_MODEL].double(), x[:, D_MODEL:].double()
    # The slow twin: one output at a time, by least squares on rows that pull every coefficient to 0.
    pull = (RIDGE * before.square().sum(0).mean()).sqrt() * torch.eye(D_MODEL, dtype=torch.float64)
    rows = torch.cat([before, pull])
    for column in range(D_MODEL):
        wanted = torch.cat([after[:, column], torch.zeros(D_MODEL, dtype=torch.float64)])
        slow = torch.linalg.lstsq(rows, wanted[:, None]).solution[:, 0]
        assert torch.allclose(found[:, column].double(), slow, atol=1e-6)
    assert torch.allclose(found, matrix, atol=0.02)


@pytest.mark.parametrize("prediction", ["last", "ridge", "nothing"])
def test_what_is_read_is_what_each_prediction_leaves(prediction: Prediction) -> None:
    updates = random_updates(3, 400).float()
    x = side_by_side(updates - updates.mean(1, keepdim=True))
    architecture = Temporal(TopK(K), STEPS, prediction)
    weights = architecture.initial_weights(x, D_SAE, torch.Generator().manual_seed(0))
    assert weights.scales is not None
    y = by_step(architecture.read(weights, x), STEPS) * weights.scales[:, None, None]
    steps = by_step(x, STEPS)
    if prediction == "nothing":
        assert torch.allclose(y, steps, atol=1e-5)
    else:
        assert (y[1:].square().mean((1, 2)) < steps[1:].square().mean((1, 2)) / 10).all()
    assert not {"scales", "predictors"} & architecture.trainable(weights).keys()


def test_the_changes_of_every_step_start_with_unit_variance() -> None:
    updates = random_updates(0, 4000)
    x = Normalizer.fit(side_by_side(updates))(side_by_side(updates))
    architecture = Temporal(TopK(K), STEPS)
    weights = architecture.initial_weights(x, D_SAE, torch.Generator().manual_seed(0))
    y = by_step(architecture.read(weights, x), STEPS)
    assert torch.allclose(y.square().mean((1, 2)), torch.ones(STEPS), atol=1e-3)
    assert "scales" not in architecture.trainable(weights)
    assert torch.allclose(weights.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)


@given(SEEDS, st.floats(0.01, 100), st.floats(-50, 50))
def test_the_served_sae_does_on_updates_what_the_trained_one_does_on_normalised_ones(
    seed: int, scale: float, offset: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    weights = SaeWeights(**{name: tensor.float() for name, tensor in random_weights(seed).tensors().items()})
    mean = torch.randn(STEPS * D_MODEL, generator=g) + offset
    architecture, normalizer = Temporal(TopK(K), STEPS), Normalizer(mean, scale)
    read_mean = dataclasses.replace(normalizer, mean=architecture.read(weights, mean))
    served, trained = (_as_bundle(w) for w in (read_mean.fold(weights), weights))
    normal = random_updates(seed, 20).float()
    x = normal * scale + by_step(mean, STEPS)[:, None]
    trained_z, served_z = encode_run_dense(trained, normal), encode_run_dense(served, x)
    slack = 2e-4 * (1 + abs(offset) / scale) * (1 + trained_z.max())
    assert ((served_z / scale - trained_z).abs() < slack).all(1).float().mean() > 0.7  # but for ties at rank k


def test_by_batch_topk_runs_share_k_on_average_and_a_threshold_serves_them_one_by_one() -> None:
    """Trained as published, served apart: as many features on average as were aimed at, whoever the mates are."""
    config = dataclasses.replace(CONFIG, selection="batch-topk", steps=120)
    x = side_by_side(random_updates(5, 4096).float())
    trainer = SaeTrainer(config, x[:512], 0, Normalizer.fit(x))
    assert trainer.weights.threshold is not None
    assert (trainer.weights.threshold < 0).all(), "nothing is observed yet"
    for step in range(config.steps):
        trainer.step(x[step % 60 * 64 :][:64], step)
    export = trainer.export()
    assert (export.architecture, export.k) == ("turbolens-temporal", None)
    sae = Sae(Bundle("b", "b", export.architecture, None, export.weights, None, "", None, {}), CPU)
    codes = sae.encode(x)
    counts = (codes.values > 0).sum(-1).float()
    # The running mean of the thresholds is still on its way from those of the first steps, which were lower.
    assert counts.mean() == pytest.approx(config.k, rel=0.5)
    assert counts.std() > 0.2, "each run has as many as it needs"
    assert torch.allclose(sae.encode(x[:1]).values.sum(), codes.values[0].sum(), rtol=1e-4)
    explained = 1 - (sae.decode(codes) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert explained > 0.5


def test_the_threshold_is_the_running_mean_of_the_smallest_selected() -> None:
    architecture = Temporal(BatchTopK(2), STEPS)
    g = torch.Generator().manual_seed(0)
    weights = architecture.initial_weights(torch.randn(64, STEPS * D_MODEL, generator=g), D_SAE, g)
    assert weights.threshold is not None
    expected = None
    for seed in range(3):
        x = torch.randn(16, STEPS * D_MODEL, generator=torch.Generator().manual_seed(seed))
        done = architecture.run(weights, architecture.read(weights, x))
        assert len(done.active.values) == 16 * 2
        smallest = float(done.pre.relu().flatten().sort(descending=True).values[31])
        expected = smallest if expected is None else 0.99 * expected + 0.01 * smallest
        architecture.observe(weights, done)
        assert weights.threshold.unique().tolist() == pytest.approx([expected], rel=1e-5)
    assert "threshold" not in architecture.trainable(weights)


def _as_bundle(weights: SaeWeights) -> Bundle:
    export = Temporal(TopK(K), STEPS).export(weights)
    return Bundle("b", "b", export.architecture, export.k, export.weights, None, "", None, {})


class Source:
    """Runs made of a few of many trajectories, off centre and far from unit scale."""

    identity = kind = "trajectories"

    def __init__(self) -> None:
        self.widths = {"a": STEPS * 16}

    def updates(self, index: int, n: int) -> torch.Tensor:
        """[T, n, 16]."""
        directions = torch.randn(40, STEPS, 16, generator=torch.Generator().manual_seed(1))
        directions *= torch.tensor([20.0, 2.0, 1.0])[:, None]
        g = torch.Generator().manual_seed(index)
        strength = 1 + torch.rand(n, 3, 1, 1, generator=g)
        changed = (strength * directions[torch.randint(40, (n, 3), generator=g)]).sum(1)
        return changed.cumsum(1).transpose(0, 1) + 100

    def tokens(self, index: int, per_image: int) -> dict[str, torch.Tensor]:
        return {"a": side_by_side(self.updates(index, 20 * per_image))}


@pytest.fixture(scope="module")
def whole() -> SaeTraining:
    """A run that never stopped."""
    run = SaeTraining(CONFIG, Source(), CPU)
    run.train(CONFIG.steps)
    return run


def test_a_trained_one_explains_every_steps_changes_in_runs_it_never_saw(whole: SaeTraining) -> None:
    export = whole.trainers["a"].export()
    assert (export.architecture, export.k) == ("turbolens-temporal", 4)
    assert (export.weights.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    sae = Sae(Bundle("a", "a", export.architecture, export.k, export.weights, None, "", None, {}), CPU)
    x = Source().updates(10_000, 500)
    made = by_step(sae.decode(sae.encode(side_by_side(x))), STEPS)
    for step in range(STEPS):
        changed, ours = (updates[step] - (updates[step - 1] if step else 0) for updates in (x, made))
        assert (changed - ours).square().sum() < 0.5 * (changed - changed.mean(0)).square().sum()


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(whole: SaeTraining, tmp_path: Path) -> None:
    first = SaeTraining(CONFIG, Source(), CPU)
    first.train(CONFIG.steps, checkpoint=tmp_path / "state.pt", stop=lambda: first.step == 137)
    second = SaeTraining(CONFIG, Source(), CPU)
    second.resume(tmp_path / "state.pt")
    assert second.step == 137
    second.train(CONFIG.steps)
    ours, theirs = (run.trainers["a"].export().weights.tensors() for run in (whole, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Data


def test_a_token_is_one_position_with_all_of_its_steps(tiny_engine) -> None:
    stream = SceneStream(tiny_engine, seed=1, split="training", images=2, one_step_share=0.0, multi_steps=(STEPS,))
    source = TemporalSource(stream, STEPS)
    assert source.widths == {name: STEPS * width for name, width in stream.widths.items()}
    updates = stream.updates(3).by_block
    for name, tokens in source.tokens(3, 5).items():
        runs = by_step(tokens.unflatten(0, (2, 5)), STEPS)  # [T, 2, 5, d_model]
        for picture in range(2):
            at = [(updates[name][0, picture] == run).all(1).nonzero().item() for run in runs[0, picture]]
            assert len(set(at)) == 5
            assert torch.equal(updates[name][:, picture, at], runs[:, picture])
    assert torch.equal(source.tokens(3, 5)["mid.0"], source.tokens(3, 5)["mid.0"])
    assert not torch.equal(source.tokens(3, 5)["mid.0"], source.tokens(4, 5)["mid.0"])


def test_runs_from_a_cache_are_those_of_the_stream_and_others_are_refused(tiny_engine, tmp_path: Path) -> None:
    stream = SceneStream(tiny_engine, seed=1, split="training", images=2, one_step_share=0.0, multi_steps=(STEPS,))
    cached = CachedStream(stream, tmp_path)
    fresh, read = (TemporalSource(source, STEPS).tokens(0, 4) for source in (stream, cached))
    for name, tokens in fresh.items():
        assert torch.allclose(tokens, read[name], rtol=2e-3, atol=1e-2)
    assert isinstance(cached.cache, ShardCache)
    with pytest.raises(ValueError, match="chunk 0 is of 3 steps, and these SAEs read 4"):
        TemporalSource(cached, 4).tokens(0, 4)


def test_quality_counts_a_code_once_and_tells_every_step(whole: SaeTraining) -> None:
    @dataclasses.dataclass
    class Runs:
        timesteps = (999, 666, 333)
        captions = seeds = ()
        by_block: dict

    export = whole.trainers["a"].export()
    bundle = Bundle("a", "a", export.architecture, export.k, export.weights, None, "", None, {})
    sae, x = Sae(bundle, CPU), [Source().updates(seed, 60).unflatten(1, (3, 20)) for seed in (5, 6)]
    measured = measure({"a": sae}, [Runs({"a": updates}) for updates in x])["a"]
    z = torch.cat([encode_run_dense(bundle, updates.flatten(1, 2)) for updates in x])
    assert measured.positions == len(z) == 120
    stats = measured.stats()
    assert np.allclose(stats.frequency, (z > 0).float().mean(0))
    assert np.allclose(stats.mean, z.sum(0) / (z > 0).sum(0).clamp(min=1), rtol=1e-4)
    assert stats.timesteps.tolist() == [999, 666, 333]
    together = torch.cat(x, 1).flatten(1, 2)
    assert np.allclose(stats.update_rms, together.square().sum(-1).mean(1).sqrt(), rtol=1e-4)
    rows = measured.rows("a", dead=0.0)
    assert [row["timestep"] for row in rows] == ["all", "999", "666", "333"]
    assert all(float(row["explained_variance"]) > 0.5 and float(row["l0_mean"]) <= 4 for row in rows)
    with pytest.raises(ValueError, match="3 steps side by side"):
        measure({"a": sae}, [Runs({"a": x[0][:2]})])


def test_sampled_runs_take_every_position_where_there_are_few() -> None:
    updates = random_updates(0, 8).float().unflatten(1, (2, 4))
    taken = sample_temporal({"a": updates}, 0, 64)["a"]
    assert taken.shape == (8, STEPS * D_MODEL)
    assert torch.equal(taken.sum(0).round(decimals=3), side_by_side(updates).sum((0, 1)).round(decimals=3))


# From the command line to a picture

BLOCKS = ("mid.0", "up.0.1")
PROMPT = "a big red star on the left, night background"


@pytest.fixture(scope="module")
def trained(small_model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of temporal SAEs of a small random model, for runs of four steps."""
    folder = tmp_path_factory.mktemp("temporal")
    small = (
        "--architecture temporal --run-steps 4 --d-sae 64 --k 6 --steps 60 --batch 64 --images 4 --reservoir 256"
        " --warm-up 2 --held-out-chunks 3 --device cpu --allow-below-gates"
    )
    cli.main(
        ["sae", "--model", str(small_model[0]), "--hook-points", *BLOCKS, "--work", str(folder / "work"),
         "--out", str(folder / "saes"), *small.split()]
    )  # fmt: skip
    return folder / "saes"


@pytest.fixture(scope="module")
def lens(small_model: tuple[Path, Path], trained: Path):
    """A client of a server over a real socket, of temporal SAEs at one block and an ordinary one at another."""
    from turbolens_server.embedded import start

    saes = (str(trained / "up.0.1"), str(small_model[1] / "mid.0"))
    with start(model=str(small_model[0]), sae=saes, device="cpu") as server, tl.connect(server.target) as connected:
        yield connected


def test_what_is_exported_says_how_it_was_made(trained: Path) -> None:
    for block in BLOCKS:
        bundle = load_bundle(trained / block)
        assert (bundle.architecture, bundle.steps, bundle.k, bundle.d_sae) == ("turbolens-temporal", 4, 6, 64)
        assert bundle.provenance["recipe"]["run_steps"] == 4
        rows = bundle.provenance["metrics"]
        assert [row["timestep"] for row in rows] == ["all", *map(str, sorted(bundle.stats.timesteps, reverse=True))]
        assert len(rows) == 5
        assert bundle.stats is not None
        assert "thresholds" in bundle.provenance["gates"]


def test_the_model_tells_architecture_and_steps(lens) -> None:
    saes = {sae.name: sae for sae in lens.model().saes}
    assert (saes["up.0.1"].architecture, saes["up.0.1"].steps, saes["up.0.1"].k) == ("turbolens-temporal", 4, 6)
    assert (saes["mid.0"].architecture, saes["mid.0"].steps) == ("topk", 0)
    assert len(saes["up.0.1"].units) == 3


def test_features_of_a_run_come_once_at_its_last_step(lens) -> None:
    found = lens.extract(PROMPT, seed=7, steps=4)
    assert found["up.0.1"].steps == (3,)
    assert found["mid.0"].steps == (0, 1, 2, 3)
    assert found["up.0.1"].shape[0] == 1
    assert 0 < (found["up.0.1"].to_dense() > 0).sum(-1).max() <= 6
    with_picture = lens.generate(PROMPT, seed=7, steps=4, features=True).features
    assert np.array_equal(with_picture["up.0.1"].to_dense(), found["up.0.1"].to_dense())
    kinds = [e for e in lens.stream_features(PROMPT, seed=7, steps=4) if isinstance(e, tl.Features)]
    assert [e.block.steps for e in kinds if e.block.sae == "up.0.1"] == [(3,)]
    # Whoever names no SAE gets those that the steps allow.
    assert list(lens.extract(PROMPT, seed=7, steps=2)) == ["mid.0"]


def test_features_can_be_added_and_put_in_place_in_every_unit(lens) -> None:
    base = lens.generate(PROMPT, seed=7, steps=4, latents=True)
    row = lens.extract(PROMPT, seed=7, steps=4, saes=["up.0.1"])["up.0.1"].top(1)[0].ref
    for steer in (
        tl.add(row, 8),
        tl.add(row, 50, unit="raw"),
        tl.add(row, 2, unit="norm", mask=tl.box(0, 0, 0.5, 1)),
        tl.add(row, 8, steps=(2, 4)),
        tl.replace(row, 3),
    ):
        steered = lens.generate(PROMPT, seed=7, steps=4, steer=[steer], latents=True)
        assert not np.allclose(steered.latents, base.latents, atol=1e-4)
    same = lens.generate(PROMPT, seed=7, steps=4, steer=[tl.add(row, 0)], latents=True)
    assert np.allclose(same.latents, base.latents, atol=1e-4)


@pytest.mark.parametrize(
    ("edit", "kind"),
    [(tl.scale("up.0.1/3", 2), "scale"), (tl.ablate("up.0.1/3"), "scale"), (tl.set_to("up.0.1/3", 1), "set")],
)
def test_edits_that_need_activations_are_refused_by_name(lens, edit, kind: str) -> None:
    with pytest.raises(tl.InvalidRequest) as caught:
        lens.generate(PROMPT, seed=7, steps=4, steer=[edit])
    (violation,) = caught.value.violations
    assert violation.field == f"run.edits[0].{kind}"
    assert f"{kind} needs activations" in violation.description
    assert "temporal SAE up.0.1" in violation.description
    assert "add and replace" in violation.description


@pytest.mark.parametrize("steps", [None, 3])
def test_another_number_of_steps_is_refused_with_the_one_that_is_served(lens, steps: int | None) -> None:
    for call in (
        lambda: lens.extract(PROMPT, seed=7, steps=steps, saes=["up.0.1"]),
        lambda: lens.generate(PROMPT, seed=7, steps=steps, steer=[tl.add("up.0.1/3", 1, unit="raw")]),
    ):
        with pytest.raises(tl.InvalidRequest) as caught:
            call()
        (violation,) = caught.value.violations
        assert violation.field == "run.sampling.steps"
        assert f"got {steps or 1}; the temporal SAE up.0.1 serves runs of 4 steps alone" in violation.description
    assert lens.generate(PROMPT, seed=7, steps=steps).seed == 7


def test_the_catalog_and_the_evaluation_take_whole_runs(
    small_model: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    model = ["--model", str(small_model[0]), "--device", "cpu", "--saes", str(trained)]
    catalog.main(["build", *model, "--work", str(tmp_path), "--images", "32", "--least-active", "2"])
    examples = [example for row in read_labels(trained / "mid.0", 64).values() for example in row.examples]
    assert {(example.steps, example.step) for example in examples} == {(4, 3)}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue ring\n")
    catalog.main(["build", *model, "--work", str(tmp_path), "--prompts", str(prompts)])

    parts = ["--parts", "quality", "stability", "--seeds", str(trained)]
    cli.main(["eval", *model, "--out", str(tmp_path / "eval"), "--quality-pictures", "4", "--batch", "4", *parts])
    tables = {name: json.loads((tmp_path / "eval" / f"{name}.json").read_text()) for name in ("quality", "stability")}
    assert len(tables["quality"]) == 2 * 5
    assert all(row["mean_cosine"] == 1.0 for row in tables["stability"])
    with pytest.raises(SystemExit, match=r"parts: splice, probes, .* whole run; --parts quality stability blocks"):
        cli.main(["eval", *model, "--out", str(tmp_path / "all")])
    assert not (tmp_path / "all").exists()
