"""What is known of features: lists, filters, pages, search."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

import turbolens as tl
from turbolens_proto.v1 import feature_service_pb2 as pb
from turbolens_server.catalog.catalog import Catalog
from turbolens_server.catalog.co_firing import read_co_firing
from turbolens_server.catalog.labels import Effect, FeatureLabels, Label, read_labels, write_labels
from turbolens_server.catalog.query import QueryError, parse_filter, parse_order
from turbolens_server.rpc.errors import RpcError
from turbolens_server.rpc.questions import get_feature, list_features, nearest
from turbolens_server.sae.bundle import BundleError, load_bundle


@pytest.fixture(scope="module")
def catalog(engine):
    return Catalog(engine.info.saes, engine.embed_text)


def test_pages_hold_every_feature_once(catalog, engine):
    token, seen, d_sae = "", [], engine.info.saes["mid.0"].bundle.d_sae
    while True:
        page = list_features(catalog, pb.ListFeaturesRequest(parent="saes/mid.0", page_size=300, page_token=token))
        seen += [feature.ref.index for feature in page.features]
        assert page.total_size == d_sae
        token = page.next_page_token
        if not token:
            break
    assert seen == list(range(d_sae))


def test_the_nearest_features_are_those_of_the_largest_cosine(lens, engine):
    directions = engine.info.saes["up.0.0"].bundle.weights.W_dec.double().numpy()
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = directions @ directions[123]
    cosines[123] = -2
    near = lens.nearest_features("up.0.0/123", limit=20)
    assert [one.ref.index for one in near] == list(np.argsort(-cosines)[:20])
    assert [one.cosine for one in near] == pytest.approx(np.sort(cosines)[::-1][:20], abs=1e-6)
    assert near[0].feature == dataclasses.replace(lens.get_feature(near[0]), examples=())
    assert len(lens.nearest_features("up.0.0/0", limit=1000)) == 100
    assert len(lens.nearest_features(("up.0.0", 255))) == 10


def test_what_fires_together_is_as_it_was_counted(lens, engine):
    bundle = engine.info.saes["up.0.0"].bundle
    counted = read_co_firing(bundle.folder, bundle.d_sae)
    often = int(bundle.stats.frequency.argmax())
    near = lens.nearest_features(("up.0.0", often), limit=100, by="co-firing")
    assert [(one.ref.index, one.jaccard) for one in near] == counted.of(often)
    assert 1 <= len(near) <= 16
    by_decoder = {one.ref: one.cosine for one in lens.nearest_features(("up.0.0", often), limit=100)}
    assert all(one.cosine == pytest.approx(by_decoder.get(one.ref, one.cosine)) for one in near)
    assert lens.nearest_features(("up.0.0", often), limit=3, by="co-firing") == near[:3]
    with pytest.raises(ValueError, match="use one of decoder, co-firing"):
        lens.nearest_features("up.0.0/1", by="cosine")


def test_a_catalog_without_counts_says_what_makes_them(engine, tmp_path):
    info = engine.info.saes["mid.0"]
    folder = tmp_path / "mid.0"
    shutil.copytree(info.bundle.folder, folder)
    (folder / "co_firing.safetensors").unlink()
    old = Catalog({"mid.0": dataclasses.replace(info, bundle=load_bundle(folder))}, engine.embed_text)
    request = pb.NearestFeaturesRequest(name="saes/mid.0/features/1", by=pb.NEARNESS_CO_FIRING)
    with pytest.raises(RpcError, match="no counts of what fires together; turbolens catalog build makes them"):
        nearest(old, request)
    with pytest.raises(RpcError, match="must be one of NEARNESS_UNSPECIFIED"):
        nearest(old, pb.NearestFeaturesRequest(name="saes/mid.0/features/1", by=7))
    assert len(nearest(old, pb.NearestFeaturesRequest(name="saes/mid.0/features/1")).features) == 10


@pytest.mark.parametrize(("name", "error"), [("up.0.0/256", tl.NotFound), ("elsewhere/0", tl.NotFound)])
def test_nothing_is_near_to_a_feature_that_is_not_there(lens, name, error):
    with pytest.raises(error):
        lens.nearest_features(name)


def test_a_size_below_zero_is_refused_by_its_field(lens):
    with pytest.raises(tl.InvalidRequest) as refused:
        lens.nearest_features("up.0.0/123", limit=-1)
    assert refused.value.violations[0].field == "page_size"


def test_filters_and_orders(lens):
    common = list(lens.list_features("up.0.1", filter="frequency > 0.01", order_by="frequency desc"))
    assert all(feature.frequency > 0.01 for feature in common)
    assert [f.frequency for f in common] == sorted((f.frequency for f in common), reverse=True)
    colors = list(lens.list_features("up.0.1", filter='attribute = "color" AND value = "blue"'))
    assert colors
    assert all(any((lb.attribute, lb.value) == ("color", "blue") for lb in f.labels) for f in colors)
    words = list(lens.list_features("up.0.1", filter='label : "blue"'))
    assert all("blue" in feature.label for feature in words)


@pytest.mark.parametrize(
    "fields",
    [
        {"page_size": -1},
        {"page_token": "nonsense"},
        {"filter": "frequency"},
        {"filter": "colour = 1"},
        {"filter": "label > 3"},
        {"filter": "frequency = blue"},
        {"filter": "frequency > 1 OR index = 2"},
        {"filter": "frequency > 1 AND"},
        {"order_by": "size"},
        {"order_by": "index sideways"},
    ],
)
def test_questions_that_cannot_be_read_are_refused_by_field(fields, catalog):
    with pytest.raises(RpcError) as caught:
        list_features(catalog, pb.ListFeaturesRequest(parent="saes/mid.0", **fields))
    assert [v.field for v in caught.value.violations] == list(fields)


def test_a_token_belongs_to_its_question(catalog):
    token = list_features(catalog, pb.ListFeaturesRequest(parent="saes/mid.0", page_size=5)).next_page_token
    with pytest.raises(RpcError, match="another"):
        list_features(catalog, pb.ListFeaturesRequest(parent="saes/mid.0", page_token=token, filter="index > 3"))


@pytest.mark.parametrize("name", ["", "saes/mid.0", "saes/mid.0/features/1024", "saes/x/features/1", "mid.0/1"])
def test_unknown_names_are_not_found(name, lens, catalog):
    with pytest.raises(RpcError) as caught:
        get_feature(catalog, pb.GetFeatureRequest(name=name))
    assert caught.value.code.name == "NOT_FOUND"


def test_search_finds_words_synonyms_and_typos(lens):
    plain = lens.search_features("blue")
    assert any((lb.attribute, lb.value) == ("color", "blue") for lb in plain[0].feature.labels)
    assert [m.score for m in plain] == sorted((m.score for m in plain), reverse=True)
    for words in ("azure", "blu", "bleu"):
        assert lens.search_features(words)[0].reason.startswith("color=blue")
    assert len(lens.search_features("night", limit=1)) == 1


def a_catalog(engine, tmp_path, rows, **entries) -> Catalog:
    """One SAE with these rows, and a text encoder that knows no word."""
    info = engine.info.saes["up.0.0"]
    folder = shutil.copytree(info.bundle.folder, tmp_path / "up.0.0")
    write_labels(folder, rows, **entries)
    bundle = load_bundle(folder)
    return Catalog({"up.0.0": dataclasses.replace(info, bundle=bundle)}, lambda texts: np.zeros((len(texts), 2)))


def blue(index, effects=(), score=0.99) -> FeatureLabels:
    return FeatureLabels(index, "blue", score, (Label("color", "blue", "thing", score),), (), effects)


NOTHING = np.zeros(2)
MEASURED = {"catalog": {"effects": {"scenes": 4, "attributes": ["color"]}}}


def test_search_ranks_by_what_moves_pictures_and_leaves_out_what_does_not(engine, tmp_path):
    def effect(rank: int, moved: float) -> tuple[Effect, ...]:
        return (Effect("color", "blue", moved, 1.0, 4.0, rank),)

    thing = FeatureLabels(8, "on a thing", 0.9, (Label("thing", "thing", "cell", 0.9),))
    rows = [blue(3), blue(5, effect(2, 0.9), 0.7), FeatureLabels(7, "", 0.0, (), (), effect(1, 0.4)), thing]
    catalog = a_catalog(engine, tmp_path, rows, **MEASURED)
    found = catalog.search("blue", (), 10, NOTHING)
    assert [match.feature.index for match in found] == [7, 5]  # in the order in which they were taken together
    assert [match.score for match in found] == pytest.approx([0.9, 0.9 * 0.95])
    assert found[0].reason == "color=blue: word, 2 together move 90% of pictures"
    # Nobody measured what moves `thing`, which no edit can: its labels still answer.
    assert [match.feature.index for match in catalog.search("thing", (), 10, NOTHING)] == [8]


def test_a_block_that_moves_nothing_is_left_out_of_search_and_said_why(engine, tmp_path):
    catalog = a_catalog(engine, tmp_path, [blue(3)], **MEASURED)
    assert catalog.search("blue", (), 10, NOTHING) == []
    assert "labelled 'blue', but none moves" in catalog.hint("blue", ())


def test_what_fits_nothing_is_said_with_what_there_is(lens, engine, tmp_path):
    found = lens.search_features("elephant")
    assert found == []
    assert found.hint.startswith("nothing fits 'elephant'; labels say ")
    assert "blue" in found.hint
    assert str(found) == found.hint
    assert "import-labels" in a_catalog(engine, tmp_path, []).hint("blue", ())
    assert "--sae" in Catalog({}, lambda texts: np.zeros((len(texts), 2))).hint("blue", ())


def test_effects_and_icons_are_read_as_they_were_written(tmp_path, engine):
    folder = shutil.copytree(engine.info.saes["mid.0"].bundle.folder, tmp_path / "mid.0")
    row = dataclasses.replace(blue(2, (Effect("color", "blue", 0.5, 0.75, 4.0, 1),), 0.75), icon_strength=8.0)
    write_labels(folder, [row, blue(3, score=0.75)])
    assert read_labels(folder, 256) == {2: row, 3: blue(3, score=0.75)}


@pytest.mark.parametrize(("query", "block"), [("", None), ("  ", None), ("x" * 201, None), ("blue", "up.9")])
def test_searches_that_cannot_be_served(query, block, lens):
    with pytest.raises(tl.InvalidRequest):
        lens.search_features(query, block=block)


def test_labels_round_trip_and_broken_files_are_refused(tmp_path):
    rows = [FeatureLabels(3, "blue", 0.9, (Label("color", "blue", "thing", 0.9),)), FeatureLabels(4, "", 0.0, ())]
    write_labels(tmp_path, rows)
    found = read_labels(tmp_path, 10)
    assert found[3].labels[0].value == "blue"
    assert found[3].label_score == pytest.approx(0.9)
    with pytest.raises(BundleError, match="outside"):
        read_labels(tmp_path, 4)
    (tmp_path / "features.parquet").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="unreadable"):
        read_labels(tmp_path, 10)
    assert read_labels(tmp_path / "nowhere", 10) == {}


def test_the_languages_say_what_they_cannot_read():
    with pytest.raises(QueryError, match="no field"):
        parse_filter("size = 3")
    with pytest.raises(QueryError, match="order"):
        parse_order(",")
