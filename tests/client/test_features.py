"""Packed features become arrays, whatever their types and however ragged; tables show them safely."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from fake_server import pack
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import turbolens as tl
from turbolens._heatmap import colorize
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import run_pb2 as run

BLOCK = "up.0.1"
EXACT = st.integers(1, 2047).map(lambda n: n / 8)  # what float16 and float32 both hold exactly


def block_of(*dense: np.ndarray, labels=None, **options) -> tl.BlockFeatures:
    return tl.BlockFeatures([pack(d, BLOCK, i, **options) for i, d in enumerate(dense)], labels or {})


@st.composite
def runs(draw):
    steps, height, width, d_sae = (draw(st.integers(1, top)) for top in (3, 4, 4, 6))
    shape = (steps, height, width, d_sae)
    values = draw(hnp.arrays(np.float32, shape, elements=EXACT))
    return np.where(draw(hnp.arrays(bool, shape)), values, 0).astype(np.float32)


@given(runs(), st.booleans())
def test_decoding_gives_back_what_was_packed(dense, wide):
    block = block_of(*dense, wide=wide)
    assert block.shape == dense.shape
    assert block.to_dense().dtype == np.float32
    assert np.array_equal(block.to_dense(), dense)
    for step in range(len(dense)):
        assert np.array_equal(block.at(step).to_dense(), dense[step : step + 1])
    for index in range(dense.shape[-1]):
        heat = block.heatmap(index)
        assert heat.dtype == np.float32
        assert np.allclose(heat, dense[..., index].mean(0))
    mean = dense.mean((0, 1, 2), dtype=np.float64)
    top = block.top(dense.shape[-1])
    assert {row.feature for row in top} == set(np.flatnonzero(mean))
    assert [row.mean for row in top] == pytest.approx(sorted(mean[mean > 0], reverse=True))


@pytest.mark.parametrize("d_sae", [65_536, 65_537])
def test_indices_are_wide_only_where_they_must_be(d_sae):
    dense = np.zeros((1, 2, d_sae), np.float32)
    dense[0, 1, d_sae - 1] = 2
    dense[0, 0, 3] = 1
    message = pack(dense, BLOCK)
    assert len(message.indices) == (4 if d_sae <= 65_536 else 8)
    block = tl.BlockFeatures([message], {})
    assert [row.feature for row in block.top()] == [d_sae - 1, 3]
    assert block.heatmap(d_sae - 1).tolist() == [[0, 2]]


def test_values_of_an_unspecified_type_are_half_precision():
    message = pack(np.full((1, 1, 1), 1.5), BLOCK)
    message.value_type = run.VALUE_TYPE_UNSPECIFIED
    assert tl.BlockFeatures([message], {}).to_dense().item() == 1.5


def test_nothing_fires():
    block = block_of(np.zeros((2, 2, 4)))
    assert block.top() == []
    assert not block.heatmap(0).any()
    assert block.to_dense().shape == (1, 2, 2, 4)
    assert block.overlay(0, Image.new("RGB", (8, 8))).size == (8, 8)
    assert "active=0" in repr(block)


def test_equal_features_keep_their_order():
    assert [row.feature for row in block_of(np.ones((1, 1, 5))).top(3)] == [0, 1, 2]


def test_a_heatmap_of_a_row_a_match_or_an_index():
    block = block_of(np.arange(8).reshape(2, 2, 2) / 8)
    row = block.top(1)[0]
    expected = block.heatmap(row.feature)
    for feature in (row, row.ref, f"{BLOCK}/1", (BLOCK, 1), np.int64(1)):
        assert np.array_equal(block.heatmap(feature), expected)
    with pytest.raises(KeyError, match=r"mid\.0/1"):
        block.heatmap("mid.0/1")
    for beyond in (-1, 2):
        with pytest.raises(IndexError, match="0 to 1"):
            block.heatmap(beyond)
    with pytest.raises(IndexError, match="steps"):
        block.at(1)


def test_an_overlay_lies_where_the_feature_fires(client):
    heat = np.zeros((2, 2, 1))
    heat[0, 1] = 3
    grey = Image.new("RGB", (8, 8), (128, 128, 128))
    shown = np.asarray(block_of(heat).overlay(0, grey, smooth=False))
    changed = (shown != 128).any(-1)
    assert changed[:4, 4:].all()
    assert not changed[4:].any()
    assert not changed[:, :4].any()
    assert block_of(heat).overlay(0, client.generate("x", seed=1)).size == (8, 8)


def test_colours_rise_in_lightness():
    shades = colorize(np.linspace(0, 1, 64, dtype=np.float32)[None])[0]
    lightness = shades @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all()


def test_notebooks_show_tables_without_running_what_labels_say(client):
    block = block_of(np.ones((1, 1, 3)), labels={2: "<script>alert(1)</script> & co"})
    shown = block._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in shown
    assert "<script>" in str(block.top())  # plain text stays as it is
    found = client.search_features("star")
    assert "<b>" not in found._repr_html_()
    assert "&lt;b&gt;star&lt;/b&gt;" in found._repr_html_()
    assert client.extract("x", seed=1)._repr_html_().count("<table>") == 2
    assert client.generate("x", seeds=[1, 2])._repr_html_().count("data:image/png;base64,") == 2


def test_a_smooth_overlay_fades_from_where_the_feature_fires():
    heat = np.zeros((4, 4, 1))
    heat[1, 1] = 3
    black = Image.new("RGB", (64, 64))
    light = np.asarray(block_of(heat).overlay(0, black)).astype(int).sum(-1)
    assert light[24, 24] == light.max() > 0
    assert (np.diff(light[24, 24:]) <= 0).all()
    assert not light[:, 40:].any()


def test_a_scale_says_what_the_colours_are():
    heat = np.ones((2, 2, 1)) * 3
    grey = Image.new("RGB", (64, 64), "grey")
    plain, scaled = (block_of(heat).overlay(0, grey, scale=scale) for scale in (False, True))
    assert scaled.size == (64, 80)
    assert np.array_equal(np.asarray(scaled)[:64], np.asarray(plain))
    strip = np.asarray(scaled)[72, 12:40].astype(int)
    assert strip[0].sum() < strip[-1].sum()  # from dark to light


def test_activations_become_columns_for_pandas_and_arrow(client):
    found = client.extract("x", seed=3, steps=2)
    block = found["up.0.1"]
    frame = block.to_pandas()
    dense = np.zeros(block.shape, np.float32)
    dense[frame["step"], frame["y"], frame["x"], frame["feature"]] = frame["activation"]
    assert np.array_equal(dense, block.to_dense())
    assert block.at(1).to_pandas()["step"].unique().tolist() == [1]
    table = found.to_arrow()
    assert table.column_names == ["sae", "step", "y", "x", "feature", "activation"]
    assert table.num_rows == sum(len(one.values) for one in found.values())
    rows = tl.Table(list(client.list_features("up.0.1")))
    assert rows.to_arrow().num_rows == len(rows)
    assert rows.to_pandas()["ref"][5] == "up.0.1/5"
    assert block.top(3).to_pandas().columns.tolist() == ["feature", "mean", "label"]


def test_without_pandas_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        block_of(np.ones((1, 1, 3))).to_pandas()


def test_pictures_of_any_kind_stand_side_by_side(client):
    pictures = [client.generate("x", seed=1), Image.new("RGB", (4, 4)), np.zeros((4, 4, 3), np.uint8)]
    shown = tl.gallery(pictures)
    assert shown.captions == ("seed 1", "1", "2")
    assert len(shown) == 3
    assert shown._repr_html_().count("<img") == 3
    assert "&lt;b&gt;" in tl.gallery(pictures[:1], ["<b>"])._repr_html_()
    with pytest.raises(ValueError, match="2 captions for 1 pictures"):
        tl.gallery(pictures[:1], ["a", "b"])


def test_the_pictures_of_a_feature_are_made_again_with_it_on_them(client, fake):
    shown = client.examples("up.0.1/5", limit=1)
    made = fake.last(gs.GenerateRequest).run
    assert (made.source.prompt.text, list(made.seeds), made.sampling.steps) == ("a blue star", [9], 2)
    assert [ref.index for ref in made.features.only] == [5]
    assert shown.captions == ("3.5: a blue star (seed 9)",)
    assert shown[0].size == (8, 24)


def test_a_feature_and_a_match_are_small_to_look_at(client):
    feature, match = client.get_feature("up.0.1/5"), client.search_features("blue")[0]
    assert repr(feature) == "Feature(up.0.1/5, 'night' 0.90, active 25.00%, mean 1.5, max 4)"
    assert repr(match) == "Match(down.2.1/1, 'blue', score 0.800, color=blue: word)"
    assert "a blue star" in feature._repr_html_()


@given(st.lists(runs(), min_size=1, max_size=4))
def test_an_average_is_that_of_each_runs_means(several):
    shape = several[0].shape
    same = [dense for dense in several if dense.shape == shape]
    found = tl.average([{BLOCK: block_of(*dense, labels={0: "star"})} for dense in same])[BLOCK]
    each = np.stack([dense.mean((0, 1, 2), dtype=np.float64) for dense in same])
    assert len(found) == len(same)
    assert found.mean == pytest.approx(each.mean(0))
    assert found.spread == pytest.approx(each.std(0, ddof=1) if len(same) > 1 else np.zeros(shape[-1]))
    assert found.share == pytest.approx((each > 0).mean(0))
    for index in range(shape[-1]):
        assert np.allclose(found.heatmap(index), np.mean([dense[..., index].mean(0) for dense in same], 0), atol=1e-4)
    top = found.top(shape[-1])
    assert [row.mean for row in top] == pytest.approx(sorted(found.mean[found.mean > 0], reverse=True))
    assert all(row.label == ("star" if row.ref.index == 0 else "") for row in top)
    assert "spread" in str(top)


def test_runs_that_differ_have_no_average():
    one = {BLOCK: block_of(np.ones((2, 2, 3), np.float32))}
    for other in ({BLOCK: block_of(np.ones((2, 1, 3), np.float32))}, {}):
        with pytest.raises(ValueError, match="differ in their SAEs, steps or size"):
            tl.average([one, other])
    with pytest.raises(ValueError, match="no runs"):
        tl.average([])
