"""Which features are asked for, and in which precision."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import turbolens as tl
from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import run_pb2 as run
from turbolens_proto.v1 import steering_pb2 as steering

ONE, OTHER = steering.FeatureRef(sae="up.0.1", index=3), steering.FeatureRef(sae="down.2.1", index=0)


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        ({}, None),
        ({"features": False}, None),
        ({"features": True}, run.FeatureSelection()),
        ({"features": "up.0.1"}, run.FeatureSelection(saes=["up.0.1"])),
        ({"only": "up.0.1/3"}, run.FeatureSelection(saes=["up.0.1"], only=[ONE])),
        ({"only": ("up.0.1", 3)}, run.FeatureSelection(saes=["up.0.1"], only=[ONE])),
        (
            {"only": [tl.feature("up.0.1", 3), "down.2.1/0", "up.0.1/3"]},
            run.FeatureSelection(saes=["up.0.1", "down.2.1"], only=[ONE, OTHER, ONE]),
        ),
        ({"features": True, "only": ["up.0.1/3"]}, run.FeatureSelection(only=[ONE])),
        (
            {"features": ["up.0.1"], "float32": True},
            run.FeatureSelection(saes=["up.0.1"], value_type=run.VALUE_TYPE_FLOAT32),
        ),
    ],
)
def test_of_a_picture(arguments, sent, client, fake):
    client.generate("x", seed=1, **arguments)
    list(client.stream_generate("x", seed=1, **arguments))
    single, streamed = fake.last(gs.GenerateRequest).run, fake.last(gs.StreamGenerateRequest).run
    for request in (single, streamed):
        assert request.HasField("features") == (sent is not None)
        request.features.ClearField("labels")
        assert request.features == (sent or run.FeatureSelection())


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        ({}, run.FeatureSelection()),
        ({"saes": ["up.0.1"]}, run.FeatureSelection(saes=["up.0.1"])),
        ({"only": "up.0.1/3"}, run.FeatureSelection(saes=["up.0.1"], only=[ONE])),
        ({"float32": True}, run.FeatureSelection(value_type=run.VALUE_TYPE_FLOAT32)),
    ],
)
def test_of_an_extraction(arguments, sent, client, fake):
    client.extract("x", seed=1, **arguments)
    list(client.stream_features("x", seed=1, **arguments))
    for kind in (fs.ExtractFeaturesRequest, fs.StreamFeaturesRequest):
        asked = fake.last(kind).run.features
        asked.ClearField("labels")
        assert asked == sent


@pytest.mark.parametrize("arguments", [{"features": False, "only": "up.0.1/3"}, {"float32": True}])
def test_more_about_features_that_are_not_asked_for_is_a_mistake(arguments, client, fake):
    with pytest.raises(ValueError, match="ask for features too"):
        client.generate("x", **arguments)
    assert not fake.requests


@pytest.mark.parametrize("empty", [[], (), np.array([], str)])
@pytest.mark.parametrize(
    ("call", "argument"),
    [
        ("generate", "features"), ("generate", "only"), ("stream_generate", "features"), ("stream_generate", "only"),
        ("extract", "saes"), ("extract", "only"), ("stream_features", "saes"), ("stream_features", "only"),
    ],
)  # fmt: skip
def test_an_empty_list_selects_nothing_and_never_everything(call, argument, empty, client, fake):
    with pytest.raises(ValueError, match=rf"^{argument} is empty .*leave it out"):
        list(getattr(client, call)("x", seed=1, **{argument: empty}))
    assert not fake.requests


def test_what_is_no_feature_is_said(client):
    with pytest.raises(ValueError, match="BLOCK/INDEX"):
        client.extract("x", only=["up"])


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        ({"k": {"up.0.1": 4}}, [run.SaeOptions(sae="up.0.1", k=4)]),
        (
            {"k": {"up.0.1": 4}, "prefix": {"down.2.1": 64, "up.0.1": 32}},
            [run.SaeOptions(sae="up.0.1", k=4, prefix=32), run.SaeOptions(sae="down.2.1", prefix=64)],
        ),
        ({"k": {}, "prefix": None}, []),
        ({"k": {"up.0.1": 0}}, [run.SaeOptions(sae="up.0.1", k=0)]),  # for the server to refuse
    ],
)
def test_how_saes_are_read(arguments, sent, client, fake):
    client.generate("x", seed=1, **arguments)
    list(client.stream_generate("x", seed=1, **arguments))
    client.extract("x", seed=1, **arguments)
    list(client.stream_features("x", seed=1, **arguments))
    for request in (
        fake.last(gs.GenerateRequest), fake.last(gs.StreamGenerateRequest),
        fake.last(fs.ExtractFeaturesRequest), fake.last(fs.StreamFeaturesRequest),
    ):  # fmt: skip
        assert list(request.run.sae_options) == sent


def test_a_k_of_no_sae_is_a_mistake(client, fake):
    with pytest.raises(TypeError, match=r'k=\{"up.0.1": 4\}'):
        client.extract("x", k=4)
    assert not fake.requests


def test_every_call_that_returns_features_takes_all():
    for name in ("generate", "stream_generate", "extract", "stream_features"):
        shown = set(inspect.signature(getattr(tl.Lens, name)).parameters)
        assert {"only", "float32", "k", "prefix", "references", "timeout"} <= shown


@pytest.mark.parametrize("call", ["generate", "stream_generate", "extract", "stream_features"])
def test_an_argument_that_a_call_does_not_have_is_a_mistake(call, client, fake):
    with pytest.raises(TypeError, match=r"no argument step$"):
        list(getattr(client, call)("x", step=2))
    assert not fake.requests


def test_float32_values_are_read_as_such(client, fake):
    block = client.extract("x", seed=1, float32=True)["up.0.1"]
    exact = client.extract("x", seed=1)["up.0.1"]
    assert block.values.dtype == np.float32
    assert np.array_equal(block.to_dense(), exact.to_dense())
