"""`turbolens sae import`: folders of other projects become bundles that are served, or nothing is written."""

from __future__ import annotations

import json

import foreign_saes as foreign
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from turbolens_server.engine.types import Job
from turbolens_server.loading.hashes import hash_unet
from turbolens_server.loading.hub import embedded_saes
from turbolens_server.loading.load import load_engine
from turbolens_server.loading.sae_cli import main
from turbolens_server.sae.bundle import load_bundle


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["import", *map(str, argv)])
    text = str(caught.value.code)
    assert text.startswith("turbolens sae import: ")
    assert "\n" not in text
    return text


def test_one_sae_becomes_a_bundle(tmp_path, capsys):
    foreign.sdxl_unbox(0).write(tmp_path / "theirs" / "unet.down_blocks.2.attentions.1_k3_hidden18" / "final")
    main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    bundle = load_bundle(tmp_path / "ours")
    assert (bundle.name, bundle.architecture, bundle.k) == ("down.2.1", "topk", 3)
    assert bundle.model_hash is None
    assert np.allclose(bundle.stats.mean, np.linspace(0, 2, foreign.D_SAE))
    assert bundle.provenance["format"] == "sdxl-unbox"
    assert bundle.provenance["source"] == "theirs"
    assert len(bundle.provenance["source_hash"]) == 64
    assert str(tmp_path) not in json.dumps(bundle.provenance)
    told = capsys.readouterr().out
    assert "down.2.1, TopK 3, 18 features of 6" in told


def test_several_saes_become_a_folder_of_bundles(tmp_path, capsys):
    foreign.sparsify(0).write(tmp_path / "theirs" / "unet.mid_block.attentions.0")
    foreign.dictionary_learning_jumprelu(0).write(tmp_path / "theirs" / "trainer_0")
    main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--json"])
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"mid.0", "down.2.1"}
    assert load_bundle(tmp_path / "ours" / "down.2.1").architecture == "jumprelu"
    told = {one["hook_point"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    assert told.keys() == {"mid.0", "down.2.1"}
    assert "the encoder's input bias" in told["down.2.1"]["folded"][0]


def test_a_converted_sae_is_bound_to_its_model_and_served(tmp_path, tiny_folder):
    """What is served from the bundle is what is served from the folder itself."""
    theirs = foreign.sparsify(0)
    wide = {name: foreign.draw(at, *((foreign.D_SAE, 64), (foreign.D_SAE,), (foreign.D_SAE, 64), (64,))[at])
            for at, name in enumerate(("encoder.weight", "encoder.bias", "W_dec", "b_dec"))}  # fmt: skip
    folder = theirs.write(tmp_path / "mid.0")
    save_file(wide, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**theirs.files["cfg.json"], "d_in": 64}))
    main(["import", str(folder), str(tmp_path / "ours"), "--model", str(tiny_folder)])
    assert load_bundle(tmp_path / "ours").model_hash == hash_unet(tiny_folder)
    got = []
    for source in (folder, tmp_path / "ours"):
        engine = load_engine(model=str(tiny_folder), saes=[str(source)])
        (result,) = engine.run([Job("a star", 0, 1, *engine.info.default_size, saes=("mid.0",))])
        got.append(result.features[0])
    assert np.array_equal(got[0].indices, got[1].indices)
    assert np.array_equal(got[0].values, got[1].values)
    assert len(got[0].values)


def test_a_block_can_be_given(tmp_path):
    foreign.sparsify(0).write(tmp_path / "theirs")
    main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--block", "up.0.1", "--format", "sparsify"])
    config = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "unet.up_blocks.0.attentions.1"


def test_a_name_can_be_given(tmp_path):
    for name in ("k5", "k10"):
        foreign.sparsify(0).write(tmp_path / name / "mid.0")
        main(["import", str(tmp_path / name), str(tmp_path / "ours" / name), "--name", name])
        bundle = load_bundle(tmp_path / "ours" / name)
        assert (bundle.name, bundle.hook_point) == (name, "mid.0")


def test_what_cannot_be_converted_writes_nothing(tmp_path, capsys):
    ours = tmp_path / "ours"
    whole = foreign.sparsify(0).write(tmp_path / "two" / "mid.0")
    nameless = foreign.sparsify(0).write(tmp_path / "nameless")
    broken = foreign.sparsify(0)
    broken.files["sae.safetensors"]["b_dec"] = torch.full((foreign.D_IN,), torch.inf)
    broken.write(tmp_path / "two" / "up.0.1")
    again = tmp_path / "again"
    for name in ("a", "b"):
        foreign.sparsify(0).write(again / name / "mid.0")
    (tmp_path / "empty").mkdir()
    for argv, says in (
        ((tmp_path / "two", ours), "not finite"),
        ((nameless, ours), "which block"),
        ((nameless, ours, "--block", "attic"), "no block"),
        ((whole, ours, "--block", "mid.9", "--model", "mini"), "mini has no block mid.9; it has down.2.0, "),
        ((whole, ours, "--model", "mini"), "reads 6 dimensions, mid.0 of mini has "),
        ((whole, ours, "--format", "saelens"), "sae_weights.safetensors is missing"),
        ((tmp_path / "two", ours, "--block", "mid.0"), "holds 2 SAEs"),
        ((again, ours), "several SAEs for mid.0"),
        ((again, ours, "--name", "k5"), "holds 2 SAEs"),
        ((whole, ours, "--name", "a/b"), "no name of an SAE"),
        ((whole, ours, "--name", "up.0.0"), "that is a block"),
        ((embedded_saes() / "mid.0", ours), "a bundle already"),
        ((tmp_path / "empty", ours), "no SAE"),
        ((tmp_path / "nowhere", ours), "no such folder"),
        ((whole, tmp_path / "two"), "exists"),
        ((whole, ours, "--model", tmp_path / "empty"), "model_index.json"),
    ):
        assert says in refused(capsys, *argv)
        assert not ours.exists()
