"""The SAEs that ship beside `mini-saes`: small, found by name, served, and what their pages claim of them."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
from torch import Tensor

import turbolens as tl
from turbolens_server.engine.engine import Engine
from turbolens_server.gating.bundle import load_gates
from turbolens_server.loading.hub import embedded_gates, embedded_saes
from turbolens_server.loading.load import load_engine
from turbolens_server.loading.places import EMBEDDED_SAES, nowhere
from turbolens_server.sae.bundle import load_bundle
from turbolens_server.sae.sae import Codes
from turbolens_server.sae.temporal import by_step, side_by_side
from turbolens_training.activations.stream import HELD_OUT, SceneStream
from turbolens_training.cli import RebuildConfig, beside
from turbolens_training.gating.config import GateConfig
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.export.bundles import recipe_of
from turbolens_training.sae.shipped import BESIDE
from turbolens_training.variants.reconstruction import Fit

BUNDLES = [(name, folder) for name in BESIDE for folder in sorted(embedded_saes(name).iterdir())]


def updates(engine: Engine, steps: int) -> Tensor:
    """Of 32 held-out pictures, [T, N, P, d_model]."""
    stream = SceneStream(engine, seed=9, split=HELD_OUT, images=32, one_step_share=0.0, multi_steps=(steps,))
    return stream.updates(0).by_block["up.0.0"]


def test_what_is_trained_is_what_has_a_name_and_a_place_in_the_package() -> None:
    assert ("mini-saes", *BESIDE) == EMBEDDED_SAES
    with (Path(__file__).parents[3] / "server/pyproject.toml").open("rb") as file:
        packed = tomllib.load(file)["tool"]["setuptools"]["package-data"]["turbolens_server.models"]
    assert {f"{name}/**/*" for name in EMBEDDED_SAES} <= {*packed}
    assert nowhere("mini", [*EMBEDDED_SAES, "nested=mini-nested"]) == []
    assert len(nowhere("mini", ["mini-other"])) == 1


@pytest.mark.parametrize(("name", "folder"), BUNDLES)
def test_each_is_small_fits_mini_and_is_trained_as_the_list_says(name: str, folder: Path, engine: Engine) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) < 750_000
    (sae,) = [sae for sae in load_engine(saes=[name]).info.saes.values() if sae.hook_point == folder.name]
    assert sae.bundle.model_hash == engine.info.model_hash
    recipe = sae.bundle.provenance["recipe"]
    for setting, value in BESIDE[name].items():
        if setting not in ("hook_points", "half"):
            assert recipe[setting] == (list(value) if isinstance(value, tuple) else value)
    assert (folder / "features.parquet").exists()


def test_the_first_set_and_the_gates_are_trained_by_the_defaults() -> None:
    """So that a rebuild, which gives none of these settings, makes what ships."""
    defaults = json.loads(json.dumps(recipe_of(SaeConfig())))
    for folder in embedded_saes().iterdir():
        recipe = load_bundle(folder).provenance["recipe"]
        assert {name: recipe[name] for name in recipe.keys() & defaults.keys() - {"prefixes"}} == {
            name: defaults[name] for name in recipe.keys() & defaults.keys() - {"prefixes"}
        }
    gates = json.loads(json.dumps(dataclasses.asdict(GateConfig()), default=str))
    recipe = load_gates(embedded_gates()).provenance["recipe"]
    assert recipe == {name: gates[name] for name in recipe}


def test_a_rebuild_makes_every_set_in_its_place_as_the_list_says(tmp_path: Path) -> None:
    made = beside(RebuildConfig(saes=tmp_path / "mini-saes"), tmp_path / "work")
    assert [training.out.name for training, _ in made] == list(BESIDE)
    for (training, catalog), (name, settings) in zip(made, BESIDE.items(), strict=True):
        assert training.out == catalog.saes == tmp_path / name
        assert training.work == tmp_path / "work" / name
        assert recipe_of(training) == recipe_of(SaeConfig(**settings))
        assert training.overwrite


def test_the_nested_one_explains_more_by_its_two_strongest_than_a_plain_one_by_its_own(engine: Engine) -> None:
    nested, plain = load_engine(saes=["mini-nested"]).saes["up.0.0"], engine.saes["up.0.0"]
    (x,) = updates(engine, 1)
    codes = plain.encode(x)
    cut = Codes(codes.values[..., :2], codes.indices[..., :2])
    mine, other = (Fit.of(x, made).explained for made in (nested.decode(nested.encode(x, k=2)), plain.decode(cut)))
    assert mine > other + 0.02
    whole, few = (Fit.of(x, nested.decode(nested.encode(x, prefix=width))).explained for width in (256, 32))
    assert whole > 0.97
    assert 0.85 < few < whole
    assert Fit.of(x, nested.decode(nested.encode(x, k=20))).explained > whole


def test_the_temporal_one_explains_every_step_and_what_changes(engine: Engine) -> None:
    sae = load_engine(saes=["mini-temporal"]).saes["up.0.0"]
    x = updates(engine, 4)
    made = by_step(sae.decode(sae.encode(side_by_side(x))), 4)
    assert all(Fit.of(step, back).explained > 0.95 for step, back in zip(x, made, strict=True))
    assert Fit.of(x.diff(dim=0).flatten(0, 1), made.diff(dim=0).flatten(0, 1)).explained > 0.4


def test_both_are_served_beside_each_other_and_steered() -> None:
    with tl.connect("embedded", sae=("nested=mini-nested", "run=mini-temporal")) as lens:
        prompt = "a big red star on the left, night background"
        z = lens.extract(prompt, seed=7, k={"nested": 2}, prefix={"nested": 32})["nested"].to_dense()
        assert z[..., :32].any()
        assert not z[..., 32:].any()
        assert (z > 0).sum(-1).max() == 2
        moved = lens.generate(prompt, seed=7, steps=4, steer=[tl.add("run/3", 8, steps=(0, 1))])
        still = lens.generate(prompt, seed=7, steps=4)
        assert moved.image.tobytes() != still.image.tobytes()
        with pytest.raises(tl.InvalidRequest, match="runs of 4 steps alone"):
            lens.generate(prompt, seed=7, steps=2, steer=[tl.add("run/3", 8)])
