"""Counts of what fires together are those of a slow count, however the positions come in batches."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolens_server.catalog.co_firing import CoFiring, read_co_firing, write_co_firing
from turbolens_server.files import hash_file
from turbolens_server.loading.hub import embedded_saes
from turbolens_server.sae.bundle import BundleError, load_bundle
from turbolens_server.sae.sae import Codes
from turbolens_training.catalog import cli, co_firing
from turbolens_training.catalog.co_firing import CoFiringCounts

D_SAE = 6


def codes(seed: int, pictures: int, positions: int, k: int = 3) -> Codes:
    """Distinct features at a position, of which some have the value 0, that is none at all."""
    generator = np.random.default_rng(seed)
    indices = np.stack([generator.permutation(D_SAE)[:k] for _ in range(pictures * positions)])
    values = generator.random((pictures * positions, k)) * (generator.random((pictures * positions, k)) < 0.6)
    indices[values == 0] = indices[0, 0]  # meaningless there, so any other's will do
    shape = (pictures, positions, k)
    return Codes(torch.from_numpy(values).float().reshape(shape), torch.from_numpy(indices).reshape(shape))


def twin(batches: list[list[Codes]]) -> np.ndarray:
    """[D_SAE, D_SAE] Jaccard indices: sets of positions, written out."""
    where: list[set[tuple[int, ...]]] = [set() for _ in range(D_SAE)]
    for b, batch in enumerate(batches):
        for step, found in enumerate(batch):
            for n, p, slot in np.ndindex(*found.values.shape):
                if found.values[n, p, slot] > 0:
                    where[int(found.indices[n, p, slot])].add((b, step, n, p))
    return np.array(
        [[len(a & b) / len(a | b) if a is not b and a | b else 0.0 for b in where] for a in where], np.float32
    )


@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 99), st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=3),
        min_size=1, max_size=3,
    ),
    rows=st.sampled_from([1, 3, 4096]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_counts_are_those_of_sets_of_positions(batches, rows):
    given_codes = [[codes(*shape) for shape in batch] for batch in batches]
    counts = CoFiringCounts(D_SAE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(co_firing, "_ROWS", rows)
        for batch in given_codes:
            counts.add(batch)
    found, wanted = counts.most(), twin(given_codes)
    for feature in range(D_SAE):
        told = found.of(feature)
        assert len(told) == (wanted[feature] > 0).sum()
        assert [share for _, share in told] == sorted((share for _, share in told), reverse=True)
        for other, share in told:
            assert share == pytest.approx(wanted[feature, other])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    shutil.copytree(embedded_saes() / "mid.0", folder := tmp_path / "saes" / "mid.0")
    (folder / "co_firing.safetensors").unlink(missing_ok=True)
    return folder


def test_alone_or_with_all_else_the_counts_are_the_same(bundle, tmp_path):
    argv = [
        "build",
        "--saes",
        str(bundle),
        "--images",
        "8",
        "--batch",
        "8",
        "--effect-scenes",
        "0",
        "--steps",
        "1",
        "2",
    ]
    before = {path.name: hash_file(path) for path in bundle.iterdir() if path.name != "provenance.json"}
    cli.main([*argv, "--work", str(tmp_path / "a"), "--co-firing-only"])
    after = {path.name: hash_file(path) for path in bundle.iterdir() if path.name != "provenance.json"}
    alone = after.pop("co_firing.safetensors")
    assert after == before
    assert load_bundle(bundle).provenance["co_firing"] == {"prompts": "captioned scenes", "pictures": 16, "seed": 0}
    cli.main([*argv, "--work", str(tmp_path / "b")])
    assert hash_file(bundle / "co_firing.safetensors") == alone
    found = read_co_firing(bundle, 256)
    assert found is not None
    assert found.others.shape == (256, 16)
    assert (found.jaccard > 0).any()


def test_more_features_than_pairs_are_counted_of_are_told_of(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("turbolens_training.catalog.build.MOST", 255)
    cli.main(
        ["build", "--saes", str(bundle), "--images", "2", "--batch", "2", "--work", str(tmp_path), "--co-firing-only"]
    )
    assert "mid.0: what fires together is not counted; it has 256 features, more than 255" in capsys.readouterr().err
    assert not (bundle / "co_firing.safetensors").exists()


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (CoFiring(np.zeros((5, 2), np.int32), np.zeros((5, 2), np.float32)), "expected"),
        (CoFiring(np.zeros((256, 2), np.int32), np.zeros((256, 3), np.float32)), "expected"),
        (CoFiring(np.full((256, 2), 256, np.int32), np.zeros((256, 2), np.float32)), "outside 0 to 255"),
        (CoFiring(np.zeros((256, 2), np.int32), np.full((256, 2), np.nan, np.float32)), "outside 0 to 1"),
        (CoFiring(np.zeros((256, 2), np.float32), np.zeros((256, 2), np.float32)), "expected indices"),
    ],
)
def test_a_file_of_another_form_is_refused(bundle, found, says):
    write_co_firing(bundle, found)
    with pytest.raises(BundleError, match=rf"co_firing\.safetensors: .*{says}"):
        read_co_firing(bundle, 256)


def test_a_file_that_is_none_is_refused_in_a_line(bundle):
    (bundle / "co_firing.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"co_firing\.safetensors: unreadable \(.*\)$"):
        read_co_firing(bundle, 256)
