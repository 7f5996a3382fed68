"""Sets of prompts told apart, sweeps and comparisons: the maths beside scipy's, and the calls over a socket."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from fake_server import D_SAE, SAES, activations
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import turbolens as tl
from turbolens._contrast import false_discovery, separate
from turbolens.cli import main

samples = st.lists(st.integers(0, 5).map(float), min_size=3, max_size=12)


@given(samples, samples)
def test_effect_and_test_are_those_of_mann_and_whitney(a, b):
    (effect,), (p,) = separate(np.array(a)[:, None], np.array(b)[:, None])
    wins = sum((x > y) - (x < y) for x in a for y in b)
    assert effect == pytest.approx(wins / (len(a) * len(b)))
    if len({*a, *b}) > 1:
        assert p == pytest.approx(stats.mannwhitneyu(a, b, method="asymptotic").pvalue, abs=1e-12)
    else:
        assert p == 1


@given(st.lists(st.floats(0, 1), max_size=30))
def test_the_correction_is_that_of_benjamini_and_hochberg(p):
    expected = stats.false_discovery_control(p) if p else []
    np.testing.assert_allclose(false_discovery(np.array(p)), expected, atol=1e-12)


def test_a_contrast_holds_means_of_prompts_and_finds_what_differs(client, monkeypatch):
    found = client.contrast(["a", "b", "c"], ["d", "e", "f"], seeds=[1, 2], limit=1000, steps=2)
    assert {row.ref.sae for row in found} == set(SAES)
    mean = np.mean([activations(seed, step) for seed in (1, 2) for step in (0, 1)], axis=(0, 1, 2))
    row = next(row for row in found if row.ref.sae == "up.0.1")
    assert (row.mean, row.other) == pytest.approx((mean[row.ref.index],) * 2, rel=1e-3)
    assert (row.effect, row.p, row.q) == (0, 1, 1), "the fake's features do not depend on the prompt"
    assert 0 <= row.ref.index < D_SAE
    assert tl.add(found[0], 3).features[0][0] == found[0].ref
    with pytest.raises(ValueError, match="a set of 2 prompts"):
        client.contrast(["a", "b"], ["d", "e", "f"])


def test_the_command_contrasts_files(running, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("x\ny\nz\n")
    files = [str(tmp_path / f"{name}.txt") for name in ("a", "b")]
    main(
        [
            "features",
            "contrast",
            *files,
            "--seed",
            "1",
            "--seed",
            "2",
            "--json",
            "--limit",
            "3",
            "--server",
            running.target,
        ]
    )
    assert [row["q"] for row in json.loads(capsys.readouterr().out)] == [1, 1, 1]


def test_a_sweep_has_every_setting_and_a_grid(client, fake):
    before = [tl.ablate("up.0.1/2")]
    swept = client.sweep(
        "x", ["up.0.1/1", {"mid.0/1": 1, "mid.0/2": 0.5}], [-4, 8], at=[None, (0, 1)], seeds=[3, 4], steps=2,
        steer=before, edit={"unit": "norm"},
    )  # fmt: skip
    assert len(swept) == 16
    assert swept[0].feature == "up.0.1/1"
    assert swept[-1].feature == "mid.0/1 + 0.5 mid.0/2"
    assert (swept[-1].strength, swept[-1].steps, swept[-1].seed) == (8, (0, 1), 4)
    edits = [r.run.edits for r in fake.requests if hasattr(r, "image")]
    assert sorted(map(len, edits)) == [1] * 2 + [2] * 16
    last = swept[-1].picture.provenance.run.steer
    assert last == (*before, tl.add({"mid.0/1": 1, "mid.0/2": 0.5}, 8, unit="norm", steps=(0, 1)))
    grid = swept.grid()
    assert grid.width == 3 * 12 + 4
    assert grid.height == 8 * (8 + 28 + 4) + 4
    assert {row.change.largest for row in swept} == {0}, "the fake's pictures do not depend on edits"
    for wrong in ({"kind": "patch"}, {"seeds": []}):
        with pytest.raises(ValueError, match=r"kind .patch.|0 pictures"):
            client.sweep("x", ["up.0.1/1"], [1], **wrong)


async def test_the_async_client_has_both(running):
    async with tl.aio.connect(running.target) as lens:
        assert len(await lens.sweep("x", ["up.0.1/1"], [1, 2])) == 2
        assert len(await lens.contrast(list("abc"), list("def"), limit=2)) == 2


def test_a_comparison_says_how_far_pictures_are_apart():
    a = np.zeros((4, 4, 3), np.uint8)
    b = a.copy()
    b[0, 0, 1], b[1, 1, 0] = 100, 8
    found = tl.compare(a, b)
    assert (found.mean, found.largest, found.moved) == (108 / 48, 100, 1 / 16)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / ((100**2 + 8**2) / 48)))
    assert tl.compare(a, a).psnr == math.inf
    assert np.asarray(found.difference)[0, 0].sum() > np.asarray(found.difference)[3, 3].sum()
    assert "before" in found._repr_html_()
    with pytest.raises(ValueError, match="4x4 and 2x4"):
        tl.compare(a, a[:, :2])
