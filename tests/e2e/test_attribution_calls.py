"""Who asks what made a feature fire, over a real socket: an exact sum, by name of word, and refusals by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import turbolens as tl
from turbolens.cli import main
from turbolens_server.embedded import start
from turbolens_server.sae.bundle import SaeWeights, save_bundle
from turbolens_server.unet.points import module_of

CROSS, SELF, PROMPT = "up.0.1.attn2.0.z", "mid.0.attn1.0.z", "a big red star on the left"


@pytest.fixture(scope="module")
def lens(small_model, tmp_path_factory):
    """A client of a server with random SAEs at two z, and one at a block."""
    folder, saes = small_model
    places = tmp_path_factory.mktemp("z")
    for at in (CROSS, SELF):
        W_dec = torch.nn.functional.normalize(torch.randn(32, 64, generator=torch.Generator().manual_seed(2)), dim=-1)
        save_bundle(
            places / at, hook_point=at, hook_module=module_of(at), model_name="small", model_hash=None,
            architecture="topk", k=8, stats=None, provenance={},
            weights=SaeWeights(W_dec.T.contiguous(), torch.ones(32), W_dec, torch.ones(64)),
        )  # fmt: skip
    model = {"model": str(folder), "sae": (str(places), str(saes / "mid.0"))}
    with start(**model) as server, tl.connect(server.target) as connected:
        yield connected


def test_words_positions_and_heads_sum_to_the_pre_activation(lens):
    for feature in ((CROSS, 3), (SELF, 3)):
        found = lens.attribute(PROMPT, feature, seed=7, steps=2, step=0)
        assert (found.seed, found.step, found.feature) == (7, 0, tl.feature(*feature))
        pre = found.pre.ravel()
        for parts in (found.by_source, found.by_head):
            np.testing.assert_allclose(parts.sum(1) + found.bias, pre, atol=1e-4)
        at = (1, 2)
        rows = found.sources(at=at)
        assert sum(row.contribution for row in rows) + found.bias == pytest.approx(found.pre[at], abs=1e-4)
        speak_for = any(row.contribution > 0 for row in rows)
        assert sum(row.share for row in rows) == pytest.approx(float(speak_for))
        assert found.heads(at=at).sum() + found.bias == pytest.approx(found.pre[at], abs=1e-4)
        assert sum(found.map(row)[at] for row in rows) + found.bias == pytest.approx(found.pre[at], abs=1e-4)


def test_activations_are_those_that_extraction_returns(lens):
    run = lens.extract(PROMPT, seed=7, steps=2, saes=[CROSS], float32=True)
    index = run[CROSS].top(1)[0].feature
    found = lens.attribute(PROMPT, (CROSS, index), seed=7, steps=2)
    np.testing.assert_allclose(found.activation, run[CROSS].at(1).heatmap(index), rtol=1e-5)


def test_words_have_their_names_and_the_padding_is_one_row(lens):
    found = lens.attribute(PROMPT, (CROSS, 0), seed=7)
    names = [row.name for row in found.sources()]
    assert sorted(names) == sorted(["<start>", *PROMPT.split(), "<end>"])
    assert len({place for row in found.sources() for place in row.places}) == len(found.tokens)
    halves = lens.attribute(PROMPT, (CROSS, 0), seed=7, regions=[(tl.box(0, 0, 0.5, 1), "a ring")])
    assert not halves.map("ring")[:, halves.width // 2 :].any()
    assert lens.attribute(PROMPT, (SELF, 0), seed=7).sources()[0].name.startswith("(")


def test_as_table_text_and_picture(lens):
    pytest.importorskip("pandas")
    found = lens.attribute(PROMPT, (CROSS, 5), seed=7)
    frame = found.to_pandas()
    summed = frame.groupby(["y", "x"]).contribution.sum().to_numpy() + found.bias
    np.testing.assert_allclose(summed, found.pre.ravel(), atol=1e-4)
    best = found.sources()[0]
    assert best.name in repr(found)
    assert len(repr(found)) < 200
    assert best.name.replace("<", "&lt;").replace(">", "&gt;") in found._repr_html_()
    left = found.image(n=3, region=tl.box(0, 0, 0.5, 1))
    assert left.size == found.image(n=3, region=tl.box(0, 0, 0.5, 1)).size
    assert len(np.unique(np.asarray(left))) > 10


def test_leaving_words_out_is_asking_without_each(lens):
    region, given = tl.box(0, 0, 0.5, 1), {"seed": 7, "steps": 2, "step": 0}
    rows = lens.leave_out(PROMPT, f"{CROSS}/3", region=region, **given)
    assert sorted(row.word for row in rows) == sorted(PROMPT.split())
    assert [row.drop for row in rows] == sorted((row.drop for row in rows), reverse=True)
    own = lens.attribute(PROMPT, f"{CROSS}/3", **given)
    weights = own.weights(region=region)
    for row in rows:
        other = lens.attribute(PROMPT.replace(row.word, "", 1).replace("  ", " ").strip(), f"{CROSS}/3", **given)
        if row.word != "a":  # which is in other words too
            assert row.prompt.split() == [word for word in PROMPT.split() if word != row.word]
            assert row.drop == pytest.approx(float(weights @ (own.pre - other.pre).ravel()), abs=1e-4)
    fell = sum(row.drop > 0 for row in rows)
    assert sum(row.share for row in rows) == pytest.approx(float(fell > 0))
    twice = lens.leave_out("a red star, a star", f"{CROSS}/3", **given)
    assert sorted(row.prompt for row in twice if row.word == "star") == ["a red , a star", "a red star, a"]
    nothing = lens.leave_out("", f"{CROSS}/3", **given)
    assert (len(nothing), str(nothing)) == (0, "the prompt has no words")
    with pytest.raises(ValueError, match="not both"):
        lens.leave_out(PROMPT, f"{CROSS}/3", at=(0, 0), region=region, **given)


@pytest.mark.parametrize(
    ("feature", "options", "field", "told"),
    [
        ("mid.0/1", {}, "feature.sae", f"sits at mid.0.*{SELF}, {CROSS}"),
        ("up.0.0.attn2.0.z/1", {}, "feature.sae", "no such SAE"),
        (f"{CROSS}/32", {}, "feature.index", "0 to 31"),
        (f"{CROSS}/1", {"steps": 2, "step": 2}, "step", "0 to 1"),
        (f"{CROSS}/1", {"steps": 0}, "run.sampling.steps", "1 to"),
    ],
)
def test_refusals_name_the_field_and_what_is_allowed(lens, feature, options, field, told):
    with pytest.raises(tl.InvalidRequest, match=told) as refused:
        lens.attribute(PROMPT, feature, seed=1, **options)
    assert field in [violation.field for violation in refused.value.violations]


def test_what_is_not_on_the_grid_is_refused(lens):
    found = lens.attribute(PROMPT, (CROSS, 0), seed=7)
    with pytest.raises(IndexError, match="rows 0 to"):
        found.sources(at=(99, 0))
    with pytest.raises(ValueError, match="not both"):
        found.heads(at=(0, 0), region=tl.box(0, 0, 1, 1))
    with pytest.raises(KeyError, match="no source 'dog'"):
        found.map("dog")


def test_the_command(lens, tmp_path, capsys):
    out = tmp_path / "why.png"
    main(["attribute", PROMPT, f"{CROSS}/3", "--server", lens._target, "--seed", "7", "--out", str(out), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["sources"][0]["contribution"] >= told["sources"][1]["contribution"]
    assert out.read_bytes().startswith(b"\x89PNG")
    main(
        [
            "attribute",
            PROMPT,
            f"{CROSS}/3",
            "--server",
            lens._target,
            "--seed",
            "7",
            "--leave-out",
            "--limit",
            "2",
            "--json",
        ]
    )
    told = json.loads(capsys.readouterr().out)
    assert [row.keys() for row in told["words"]] == [{"word", "drop", "share"}] * 2
    with pytest.raises(SystemExit) as ended:
        main(["attribute", PROMPT, f"{CROSS}/3", "--server", lens._target, "--leave-out", "--out", str(out)])
    assert ended.value.code not in (None, 0)
    with pytest.raises(SystemExit) as ended:
        main(["attribute", PROMPT, "mid.0/1", "--server", lens._target])
    assert ended.value.code == 2
