"""What is known of features, with labels, on bundles that are made up: filters, pages and search over the wire."""

from __future__ import annotations

import dataclasses

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeEngine, a_bundle, an_info

from tests import messages
from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_server.catalog.catalog import Catalog
from turbolens_server.catalog.labels import FILE_NAME, SCHEMA, Example, FeatureLabels, Label, read_labels, write_labels
from turbolens_server.engine.info import SaeInfo
from turbolens_server.sae.bundle import BundleError

EXAMPLES = (Example("a blue sky", 2**40, 4, 3, 1, 2, 7.5), Example("", 0, 1, 0, 0, 0, 0.25))
ROWS = (
    FeatureLabels(3, "blue star", 0.9, (Label("color", "blue", "thing", 0.9), Label("shape", "star", "thing", 0.8))),
    FeatureLabels(4, "blue", 0.8, (Label("color", "blue", "background", 0.8),), EXAMPLES),
    FeatureLabels(6, "night", 1.0, (Label("background", "night", "background", 1.0),)),
    FeatureLabels(9, "unsure blue", 0.5, (Label("color", "blue", "thing", 0.5),)),
)


async def served(loading, folder, *, stats: bool, rows=ROWS):
    write_labels(folder, rows)
    bundle = a_bundle("mid.0", stats=stats, folder=folder, provenance={"synonyms": {"blue": ["azure"]}})
    info = dataclasses.replace(an_info(), saes={"mid.0": SaeInfo("mid.0", "mid.0", bundle, forced=False)})
    await loading.serving.make_ready(FakeEngine(info))
    return loading.features


@pytest.fixture
async def labelled(loading, tmp_path):
    return await served(loading, tmp_path, stats=True)


async def indices(stub, **fields) -> list[int]:
    page = await stub.ListFeatures(fs.ListFeaturesRequest(parent="saes/mid.0", **fields))
    assert page.total_size >= len(page.features)
    return [feature.ref.index for feature in page.features]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('attribute = "color" AND value = "blue"', [3, 4, 9]),
        ('attribute = "shape" AND value = "blue"', []),  # of one and the same label
        ('label : "blue" AND label_score > 0.5', [3, 4]),
        ("label : blu", []),
        ('label = "night"', [6]),
        ("index >= 3 AND index != 4 AND index < 6", [3, 5]),
        ("mean = 0", [5]),
        ("max > 5 AND frequency <= 0.45", [11, 12, 13]),
    ],
)
async def test_filters(text, found, labelled):
    got = await indices(labelled, filter=text)
    assert got == found


async def test_orders_and_pages(labelled):
    assert (await indices(labelled, order_by="label_score desc, index desc"))[:3] == [6, 3, 4]
    request = fs.ListFeaturesRequest(parent="saes/mid.0", filter="label_score > 0", order_by="label desc", page_size=2)
    first = await labelled.ListFeatures(request)
    request.page_token = first.next_page_token
    second = await labelled.ListFeatures(request)
    assert [f.label for page in (first, second) for f in page.features] == ["unsure blue", "night", "blue star", "blue"]
    assert (first.total_size, second.next_page_token) == (4, "")
    request.order_by = "label"
    with pytest.raises(grpc.aio.AioRpcError, match="page_token"):
        await labelled.ListFeatures(request)


async def test_one_feature_comes_with_its_examples_and_many_without(labelled):
    async def examples(index: int) -> list[fs.FeatureExample]:
        request = fs.GetFeatureRequest(name=f"saes/mid.0/features/{index}")
        return list((await labelled.GetFeature(request)).feature.examples)

    assert await examples(4) == [
        fs.FeatureExample(prompt="a blue sky", seed=2**40, steps=4, step=3, y=1, x=2, activation=7.5),
        fs.FeatureExample(activation=0.25, steps=1),
    ]
    assert await examples(3) == await examples(0) == [], "no example, and nothing known"
    page = await labelled.ListFeatures(fs.ListFeaturesRequest(parent="saes/mid.0"))
    found = await labelled.SearchFeatures(fs.SearchFeaturesRequest(query="blue"))
    assert not any(feature.examples for feature in (*page.features, *(match.feature for match in found.matches)))


async def test_questions_have_a_length(labelled):
    for fields in (
        {"filter": "x" * 100_000 + " = 1"},
        {"order_by": "index," * 300},
        {"filter": "index=1 AND " * 10**5},
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="at most 1000") as caught:
            await indices(labelled, **fields)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def search(stub, query, **fields) -> list[tuple[int, float, str]]:
    answer = await stub.SearchFeatures(fs.SearchFeaturesRequest(query=query, **fields))
    return [(m.feature.ref.index, round(m.score, 3), m.reason) for m in answer.matches]


async def test_search_multiplies_nearness_with_sureness(loading, tmp_path):
    unmeasured = await served(loading, tmp_path, stats=False)
    assert (await search(unmeasured, "Blue"))[:2] == [(3, 0.8, "color=blue: word"), (4, 0.6, "color=blue: word")]
    assert (await search(unmeasured, "azure sky"))[0] == (3, 0.8, "color=blue: synonym")


async def test_a_common_feature_is_found_before_a_surer_one_that_hardly_ever_fires(loading, tmp_path):
    """Feature i fires at i / 30 of the positions, so 8 is in the middle of those that ever do."""
    neon = [FeatureLabels(i, "neon", s, (Label("style", "neon", "", s),)) for i, s in ((0, 1.0), (1, 1.0), (8, 0.9))]
    stub = await served(loading, tmp_path, stats=True, rows=neon)
    assert await search(stub, "neon") == [
        (8, round(0.8 / 2, 3), "style=neon: word"),
        (1, round(1 / (1 + 8), 3), "style=neon: word"),
        (0, 0.0, "style=neon: word"),
    ]


async def test_search_knows_typos_and_leaves_out_chance(labelled):
    prefix, typo = (await search(labelled, "nig"))[0], (await search(labelled, "nihgt"))[0]
    assert (prefix[0], typo[0]) == (6, 6)
    assert 1 > prefix[1] >= typo[1] > 0
    assert all(index != 9 for index, _, _ in await search(labelled, "blue", page_size=100))  # chance is not sure


async def test_an_sae_asked_twice_answers_once(labelled):
    found = await search(labelled, "blue", saes=["mid.0", "mid.0"])
    assert len({index for index, _, _ in found}) == len(found)


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"query": " "}, "query"), ({"query": "x" * 201}, "query"), ({"query": "x", "saes": ["?"]}, r"saes\[0\]"),
     ({"query": "x", "page_size": -1}, "page_size")],
)  # fmt: skip
async def test_searches_that_cannot_be_served(fields, field, labelled):
    with pytest.raises(grpc.aio.AioRpcError, match=field) as caught:
        await labelled.SearchFeatures(fs.SearchFeaturesRequest(**fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"index": None}, "unreadable"),
        ({"index": 99}, "outside"),
        ({"label_score": float("nan")}, "score"),
        ({"labels": [{"attribute": None, "value": "x", "region": "", "score": 1.0}]}, "lacks"),
        ({"labels": [{"attribute": "x", "value": "x", "region": "", "score": float("nan")}]}, "score"),
    ],
)
def test_a_malformed_file_is_refused_at_load(changes, says, tmp_path):
    row = {"index": 1, "label": "a", "label_score": 0.7, "labels": [], **changes}
    pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA), tmp_path / FILE_NAME)
    with pytest.raises(BundleError, match=says):
        read_labels(tmp_path, 16)


def test_a_feature_has_one_row(tmp_path):
    write_labels(tmp_path, [ROWS[0], ROWS[0]])
    with pytest.raises(BundleError, match="more than one"):
        read_labels(tmp_path, 16)


@pytest.mark.parametrize("synonyms", [[], {"blue": "azure"}, {"blue": [1]}])
def test_malformed_synonyms_are_refused_at_load(synonyms):
    bundle = a_bundle("mid.0", stats=True, provenance={"synonyms": synonyms})
    with pytest.raises(BundleError, match="synonyms"):
        Catalog({"mid.0": SaeInfo("mid.0", "mid.0", bundle, forced=False)}, FakeEngine().embed_text)


async def test_labels_come_with_the_first_features_of_an_sae_where_they_are_asked_for(labelled):
    async def told(**selection) -> list[dict[int, str]]:
        request = messages.stream_features(
            prompt="", seeds=[1, 2], sampling={"steps": 2}, features={"labels": True, **selection}
        )
        stream = [event async for event in labelled.StreamFeatures(request)]
        return [dict(event.features.features.labels) for event in stream if event.HasField("features")]

    every = {3: "blue star", 4: "blue", 6: "night", 9: "unsure blue"}
    assert await told() == [every, {}, {}, {}]
    assert await told(only=[{"sae": "mid.0", "index": 4}, {"sae": "mid.0", "index": 5}]) == [{4: "blue"}, {}, {}, {}]
    assert await told(labels=False) == [{}] * 4
    answer = await labelled.ExtractFeatures(messages.extract(prompt="", seeds=[1, 2], features={"labels": True}))
    assert [dict(made.features[0].labels) for made in answer.extractions] == [every, {}]
