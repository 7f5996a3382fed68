"""Whole requests over a real socket: what good ones give, and what bad ones are told."""

from __future__ import annotations

import asyncio
import io
import json
import threading

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import turbolens as tl
from tests import messages
from turbolens_proto.v1 import feature_service_pb2_grpc, generation_service_pb2_grpc
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import run_pb2 as run
from turbolens_proto.v1 import steering_pb2 as steering

PROMPT = "a big red star on the left, night background"
FEATURE = ("mid.0", 0)


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.target) as channel:
        yield generation_service_pb2_grpc.GenerationServiceStub(channel)


@pytest.fixture(scope="module")
def live(lens):
    """A feature of each block that fires on PROMPT, so that it has a mean."""
    return {sae: block.top(1)[0].ref for sae, block in lens.extract(PROMPT, seed=7).items()}


# What good requests give


def test_one_seed_gives_a_picture_and_several_give_several(lens):
    one = lens.generate(PROMPT, seed=7)
    assert one.image.size == (128, 128)
    assert one.array.std() > 10
    several = lens.generate(PROMPT, seeds=[7, 8, 9])
    assert [p.seed for p in several] == [7, 8, 9]
    assert np.abs(several[0].array.astype(int) - one.array).max() <= 3
    assert np.abs(several[1].array.astype(int) - one.array).max() > 10


def test_more_seeds_than_a_batch_come_back_in_order(lens):
    pictures = lens.generate(PROMPT, seeds=list(range(11)))
    assert [p.seed for p in pictures] == list(range(11))
    alone = lens.generate(PROMPT, seed=10)
    assert np.abs(pictures[10].array.astype(int) - alone.array).max() <= 3


def test_a_seed_left_out_is_drawn_told_and_repeatable(lens):
    first = lens.generate(PROMPT)
    assert lens.generate(PROMPT, seed=first.seed).bytes == first.bytes
    assert lens.generate(PROMPT).seed != first.seed


def test_a_result_says_all_that_makes_it_again(lens, live):
    ref = live["up.0.1"]
    picture = lens.generate(PROMPT, seed=7, steps=2, steer=[tl.add(ref, 4)])
    told = picture.provenance
    assert told.run == tl.Run(prompt=PROMPT, seeds=(7,), steps=2, width=128, height=128, steer=(tl.add(ref, 4),))
    assert list(told.sae_hashes) == ["up.0.1"]
    assert told.model_hash == lens.model().hash
    assert {"torch", "diffusers", "transformers", "turbolens"} <= set(told.versions)
    assert not told.forced_sae


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "raw"])
def test_every_format(lens, kind, tmp_path):
    picture = lens.generate(PROMPT, seed=7, format=kind)
    exact = lens.generate(PROMPT, seed=7)
    assert np.abs(picture.array.astype(int) - exact.array).mean() < (0.01 if kind in ("png", "raw") else 6)
    picture.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (128, 128)


def test_latents_on_request(lens):
    assert lens.generate(PROMPT, seed=7).latents is None
    assert lens.generate(PROMPT, seed=7, latents=True).latents.shape == (4, 32, 32)


def test_features_beside_a_picture_are_those_of_extract(lens):
    with_picture = lens.generate(PROMPT, seed=7, steps=2, features=True).features
    alone = lens.extract(PROMPT, seed=7, steps=2)
    sizes = {sae.name: sae.d_sae for sae in lens.model().saes}
    assert list(with_picture) == list(alone) == list(sizes)
    for sae, d_sae in sizes.items():
        assert alone[sae].shape == (2, 8, 8, d_sae)
        assert np.array_equal(alone[sae].to_dense(), with_picture[sae].to_dense())
    only = lens.generate(PROMPT, seed=7, features=["up.0.1"]).features
    assert list(only) == ["up.0.1"]


def test_top_heatmap_and_dense_agree(lens):
    block = lens.extract(PROMPT, seed=7, steps=2)["up.0.1"]
    dense = block.to_dense()
    top = block.top(5)
    assert [row.mean for row in top] == sorted((row.mean for row in top), reverse=True)
    for row in top:
        assert row.mean == pytest.approx(dense[..., row.feature].mean(), rel=1e-5)
        assert np.allclose(block.heatmap(row.feature), dense[..., row.feature].mean(0), atol=1e-6)
        assert np.allclose(block.at(1).heatmap(row.feature), dense[1, ..., row.feature], atol=1e-6)
    with pytest.raises(IndexError):
        block.heatmap(1024)
    assert block.overlay(top[0].feature, lens.generate(PROMPT, seed=7).image).size == (128, 128)


def test_only_named_features_and_both_value_types(server):
    with grpc.insecure_channel(server.target) as channel:
        stub = feature_service_pb2_grpc.FeatureServiceStub(channel)

        def extract(**selection):
            request = messages.extract(prompt=PROMPT, seeds=[7], features=run.FeatureSelection(**selection))
            return stub.ExtractFeatures(request).extractions[0].features

        whole = extract(saes=["mid.0"], value_type=run.VALUE_TYPE_FLOAT32)[0]
        half = extract(saes=["mid.0"])[0]
        assert len(whole.values) == 2 * len(half.values)
        assert np.allclose(np.frombuffer(whole.values, "<f4"), np.frombuffer(half.values, "<f2"), rtol=2e-3)
        wanted = int(np.frombuffer(whole.indices, "<u2")[0])
        one = extract(saes=["mid.0"], only=[steering.FeatureRef(sae="mid.0", index=wanted)])[0]
        assert set(np.frombuffer(one.indices, "<u2")) == {wanted}
        assert np.frombuffer(one.counts, "<u2").sum() == (np.frombuffer(whole.indices, "<u2") == wanted).sum()


def test_a_stream_tells_every_step_and_ends_with_done(lens):
    events = list(lens.stream_generate(PROMPT, seeds=[7, 8], steps=3, features=["mid.0"], previews=True))
    kinds = [type(e).__name__ for e in events]
    assert kinds[0] == "Queued"
    assert kinds[-1] == "Done"
    assert (kinds.count("Step"), kinds.count("Features"), kinds.count("PictureReady")) == (6, 6, 2)
    previews = [e.preview for e in events if isinstance(e, tl.Step)]
    assert sum(p is not None for p in previews) == 4
    pictures = [e.picture for e in events if isinstance(e, tl.PictureReady)]
    assert pictures[0].bytes == lens.generate(PROMPT, seeds=[7, 8], steps=3)[0].bytes


def test_the_examples_of_a_feature_are_true(lens):
    often = next(lens.list_features("up.0.1", order_by="frequency desc"))
    assert often.examples == ()
    known = lens.get_feature(often)
    strengths = [example.activation for example in known.examples]
    assert strengths == sorted(strengths, reverse=True) != []
    for example in known.examples:
        found = lens.extract(example.prompt, seed=example.seed, steps=example.steps, only=often, float32=True)
        there = found["up.0.1"].at(example.step).heatmap(often)[example.y, example.x]
        assert there == pytest.approx(example.activation, rel=1e-2)


def test_a_strength_for_each_step_is_an_edit_for_each_step(lens, live):
    ref, other = live["up.0.1"], {"other": tl.reference("a blue ring")}
    for make in (
        lambda a, **when: tl.add(ref, a, mask=tl.box(0, 0, 0.5, 1), **when),
        lambda a, **when: tl.scale(ref, a, **when),
        lambda a, **when: tl.replace(live["mid.0"], a, **when),
        lambda a, **when: tl.transfer(ref, "other", multiplier=a, **when),
    ):
        edit = make([8.0, 0.5, -4.0])
        more = {"references": other} if edit.kind == "transfer" else {}
        one = lens.generate(PROMPT, seed=7, steps=3, steer=[edit], **more)
        each = [make(a, steps=(i, i + 1)) for i, a in enumerate((8.0, 0.5, -4.0))]
        assert one.bytes == lens.generate(PROMPT, seed=7, steps=3, steer=each, **more).bytes
        assert one.provenance.run.steer == (edit,)
    with pytest.raises(tl.InvalidRequest, match=r"amounts: got '2 amounts'; give one for each of the 3 steps"):
        lens.generate(PROMPT, seed=7, steps=3, steer=[tl.add(ref, [1, 2])])


def test_an_edit_acts_where_another_feature_is_strong(lens, live):
    ref, block = live["up.0.1"], lens.extract(PROMPT, seed=7, saes=["up.0.1"])["up.0.1"]
    other = block.top(2)[1].ref
    seen = block.heatmap(other)
    level = float(np.median(seen[seen > 0]))
    plain, full = (lens.generate(PROMPT, seed=7, steer=edits) for edits in ([], [tl.set_to(ref, 30)]))

    def steered(**rule):
        return lens.generate(PROMPT, seed=7, steer=[tl.set_to(ref, 30, where=tl.where(other, unit="raw", **rule))])

    assert steered(above=1000).bytes == plain.bytes
    assert steered(below=1000).bytes == full.bytes
    above = steered(above=level)
    assert above.bytes not in (plain.bytes, full.bytes)
    by_mask = lens.generate(PROMPT, seed=7, steer=[tl.set_to(ref, 30, mask=tl.mask((seen > level).astype(float)))])
    assert above.bytes == by_mask.bytes
    as_map = np.round(np.minimum(seen / level, 1) * 255) / 255
    by_map = lens.generate(PROMPT, seed=7, steer=[tl.set_to(ref, 30, mask=tl.mask(as_map))])
    assert np.abs(steered(map=level).array.astype(int) - by_map.array).max() <= 3
    assert above.provenance.run.steer[0].where == tl.where(other, above=np.float32(level), unit="raw")
    with pytest.raises(tl.InvalidRequest, match=r"condition.feature: is of mid.0; an edit of up.0.1"):
        lens.generate(PROMPT, seed=7, steer=[tl.add(ref, 1, where=tl.where(live["mid.0"], above=1))])


def test_the_direction_of_a_feature_is_its_decoder_row(lens):
    near = lens.nearest_features("up.0.1/202", limit=1)[0]
    rows = [lens.get_feature(ref).direction for ref in ("up.0.1/202", near)]
    d_model = next(point.d_model for point in lens.model().hook_points if point.name == "up.0.1")
    assert rows[0].shape == (d_model,)
    cosine = rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
    assert cosine == pytest.approx(near.cosine, abs=1e-3)
    assert near.feature.direction is None


def test_streamed_features_are_the_extracted_ones(lens):
    streamed = [e for e in lens.stream_features(PROMPT, seed=7, steps=2) if isinstance(e, tl.Features)]
    whole = lens.extract(PROMPT, seed=7, steps=2)
    assert len(streamed) == 8
    for event in streamed:
        (step,) = event.block.steps
        assert np.array_equal(event.block.to_dense()[0], whole[event.block.sae].to_dense()[step])


def test_the_async_client_gives_the_same(server, lens):
    async def both():
        async with tl.aio.connect(server.target) as alens:
            picture, found = await asyncio.gather(alens.generate(PROMPT, seed=7), alens.search_features("blue"))
            events = [e async for e in alens.stream_generate(PROMPT, seed=7)]
            return picture, found, events

    picture, found, events = asyncio.run(both())
    assert picture.bytes == lens.generate(PROMPT, seed=7).bytes
    assert [m.ref for m in found] == [m.ref for m in lens.search_features("blue")]
    assert isinstance(events[-1], tl.Done)


def test_the_two_clients_have_one_surface():
    def surface(cls):
        return {name for name in vars(cls) if not name.startswith("_")}

    assert surface(tl.Lens) == surface(tl.aio.AsyncLens)


def test_a_mask_holds_an_edit_to_its_place(lens):
    base = lens.generate(PROMPT, seed=7).array.astype(float)
    purple = lens.search_features("purple", block="up.0.0")[:4]  # what paints a thing, and not what places it
    edit = tl.add(purple, 5, mask=tl.box(0, 0, 0.5, 1))
    change = np.abs(lens.generate(PROMPT, seed=7, steer=[edit]).array - base).mean(-1)
    assert change[:, :64].mean() > 5
    assert change[:, :64].mean() > 2 * change[:, 96:].mean()
    same = tl.add(purple, 5, mask=tl.mask(np.repeat([[1.0] * 4 + [0.0] * 4], 8, 0)))
    again = np.abs(lens.generate(PROMPT, seed=7, steer=[same]).array - base).mean(-1)
    assert np.allclose(change, again, atol=1)


def test_an_extra_long_prompt_is_cut_with_a_warning(lens):
    assert [w.code for w in lens.generate("star " * 300, seed=1).warnings] == ["PROMPT_CUT"]
    (warning,) = lens.generate("a star", regions=[(tl.box(0, 0, 0.5, 1), "star " * 300)], seed=1).warnings
    assert warning.code == "PROMPT_CUT"
    assert "or a region's last" in warning.message
    assert lens.generate("", seed=1).warnings == ()


# What bad requests are told


def request(**fields) -> gs.GenerateRequest:
    return messages.generate(**{"prompt": PROMPT, "seeds": [7], **fields})


def an_edit(**fields) -> dict:
    term = {"feature": {"sae": "mid.0", "index": 3}}
    return {"features": [term], "add": {"strength": 1.0, "unit": steering.UNIT_RAW}, **fields}


def a_png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


BAD = {
    "no source": (messages.generate(seeds=[1]), "run.source"),
    "long prompt": (request(prompt="x" * 4001), "run.source.prompt.text"),
    "negative seed": (request(seeds=[0, -1]), "run.seeds[1]"),
    "too many seeds": (request(seeds=range(17)), "run.seeds"),
    "no steps": (request(sampling={"steps": 0}), "run.sampling.steps"),
    "too many steps": (request(sampling={"steps": 5}), "run.sampling.steps"),
    "odd width": (request(sampling={"width": 100}), "run.sampling.width"),
    "huge height": (request(sampling={"height": 1 << 20}), "run.sampling.height"),
    "guidance": (request(sampling={"guidance_scale": 0.5}), "run.sampling.guidance_scale"),
    "nan guidance": (request(sampling={"guidance_scale": float("nan")}), "run.sampling.guidance_scale"),
    "long id": (request(request_id="x" * 129), "request_id"),
    "no kind": (request(edits=[{"features": [{"feature": {"sae": "mid.0"}}]}]), "run.edits[0].kind"),
    "no features": (request(edits=[{"add": {"strength": 1}}]), "run.edits[0].features"),
    "unknown block": (
        request(edits=[an_edit(features=[{"feature": {"sae": "up.9.9"}}])]),
        "run.edits[0].features[0].feature.sae",
    ),
    "feature past the end": (
        request(edits=[an_edit(), an_edit(features=[{"feature": {"sae": "mid.0", "index": 1024}}])]),
        "run.edits[1].features[0].feature.index",
    ),
    "negative feature": (
        request(edits=[an_edit(features=[{"feature": {"sae": "mid.0", "index": -1}}])]),
        "run.edits[0].features[0].feature.index",
    ),
    "twice": (
        request(edits=[an_edit(features=[{"feature": {"sae": "mid.0", "index": 3}}] * 2)]),
        "run.edits[0].features[1].feature",
    ),
    "nan strength": (request(edits=[an_edit(add={"strength": float("nan")})]), "run.edits[0].add.strength"),
    "infinite factor": (request(edits=[an_edit(scale={"factor": float("inf")})]), "run.edits[0].scale.factor"),
    "absurd value": (request(edits=[an_edit(set={"value": 1e9})]), "run.edits[0].set.value"),
    "unknown unit": (request(edits=[an_edit(add={"strength": 1, "unit": 77})]), "run.edits[0].add.unit"),
    "weight on scale": (
        request(edits=[{"features": [{"feature": {"sae": "mid.0", "index": 3}, "weight": 2}], "scale": {}}]),
        "run.edits[0].features[0].weight",
    ),
    "too many edits": (request(edits=[an_edit()] * 65), "run.edits"),
    "reversed steps": (request(edits=[an_edit(steps={"start": 1, "end": 1})]), "run.edits[0].steps"),
    "steps outside": (request(edits=[an_edit(steps={"start": 0, "end": 2})]), "run.edits[0].steps"),
    "mask without shape": (request(edits=[an_edit(mask={})]), "run.edits[0].mask.shape"),
    "no boxes": (request(edits=[an_edit(mask={"boxes": {}})]), "run.edits[0].mask.boxes.boxes"),
    "reversed box": (
        request(edits=[an_edit(mask={"boxes": {"boxes": [{"left": 0.5, "right": 0.2, "bottom": 1}]}})]),
        "run.edits[0].mask.boxes.boxes[0]",
    ),
    "box outside": (
        request(edits=[an_edit(mask={"boxes": {"boxes": [{"right": 1.5, "bottom": 1}]}})]),
        "run.edits[0].mask.boxes.boxes[0]",
    ),
    "two points": (
        request(edits=[an_edit(mask={"polygons": {"polygons": [{"points": [{"x": 0.1}, {"y": 0.1}]}]}})]),
        "run.edits[0].mask.polygons.polygons[0].points",
    ),
    "broken png": (request(edits=[an_edit(mask={"png": b"\x89PNG nothing"})]), "run.edits[0].mask.png"),
    "black png": (request(edits=[an_edit(mask={"png": a_png(np.zeros((8, 8), np.uint8))})]), "run.edits[0].mask.png"),
    "large png": (request(edits=[an_edit(mask={"png": b"x" * (4 * 2**20 + 1)})]), "run.edits[0].mask.png"),
    "overlapping replace": (
        request(edits=[an_edit(replace={"strength": 1, "unit": 1}), an_edit(replace={"strength": 2, "unit": 1})]),
        "run.edits[1].mask",
    ),
    "unknown format": (request(image={"format": 99}), "image.format"),
    "quality of png": (request(image={"quality": 50}), "image.quality"),
    "quality too high": (request(image={"format": run.IMAGE_FORMAT_JPEG, "quality": 101}), "image.quality"),
    "unknown sae": (request(features={"saes": ["x"]}), "run.features.saes[0]"),
    "only of another": (
        request(features={"saes": ["mid.0"], "only": [{"sae": "up.0.0", "index": 1}]}),
        "run.features.only[0].sae",
    ),
    "unknown value type": (request(features={"value_type": 9}), "run.features.value_type"),
}


def violations_of(error: grpc.RpcError) -> dict[str, str]:
    found = {}
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            found |= {v.field: v.description for v in bad.field_violations}
    return found


@pytest.mark.parametrize("case", BAD)
def test_a_bad_field_is_named(case, stub):
    message, field = BAD[case]
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in violations_of(caught.value), violations_of(caught.value)


def test_every_violation_is_told_at_once(lens):
    with pytest.raises(tl.InvalidRequest) as caught:
        lens.generate("x" * 5000, seeds=[-1], steps=9, steer=[tl.add(("mid.0", 9999), float("nan"))])
    fields = {v.field for v in caught.value.violations}
    assert {"run.source.prompt.text", "run.seeds[0]", "run.sampling.steps", "run.edits[0].add.strength"} <= fields
    assert "run.edits[0].features[0].feature.index" in fields
    assert caught.value.request_id


def test_a_feature_that_never_fires_has_no_mean(lens):
    blocks = [sae.name for sae in lens.model().saes]
    dead = next((feature for block in blocks for feature in lens.list_features(block, filter="mean = 0")), None)
    if dead is None:
        pytest.skip("every feature fires")
    with pytest.raises(tl.InvalidRequest, match="never active"):
        lens.generate(PROMPT, seed=7, steer=[tl.add(dead, 1)])
    lens.generate(PROMPT, seed=7, steer=[tl.add(dead, 1, unit="raw")])


def test_a_stream_names_fields_as_a_call_does(lens):
    with pytest.raises(tl.InvalidRequest) as caught:
        list(lens.stream_generate(PROMPT, seed=-1))
    assert caught.value.violations[0].field == "run.seeds[0]"


any_float = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, 0.5]))
unit_float = st.one_of(st.floats(0, 1, width=32), any_float)
any_int32 = st.one_of(st.integers(-3, 1030), st.integers(-(2**31), 2**31 - 1))
masks = st.one_of(
    st.builds(lambda b: {"png": b}, st.binary(max_size=60)),
    st.builds(
        lambda c: {"boxes": {"boxes": [dict(zip(("left", "top", "right", "bottom"), x, strict=True)) for x in c]}},
        st.lists(st.tuples(*[unit_float] * 4), max_size=3),
    ),
    st.builds(
        lambda p: {"polygons": {"polygons": [{"points": [{"x": x, "y": y} for x, y in q]} for q in p]}},
        st.lists(st.lists(st.tuples(unit_float, unit_float), max_size=5), max_size=2),
    ),
)
terms = st.fixed_dictionaries(
    {"feature": st.fixed_dictionaries({"sae": st.sampled_from(["mid.0", "up.0.1", "", "ö"]), "index": any_int32})},
    optional={"weight": any_float},
)
amounts = st.fixed_dictionaries({"strength": any_float, "unit": st.integers(-2, 5)})
kinds = st.one_of(
    st.builds(lambda a: {"add": a}, amounts),
    st.builds(lambda a: {"replace": a}, amounts),
    st.builds(lambda f: {"scale": {"factor": f}}, any_float),
    st.builds(lambda f, u: {"set": {"value": f, "unit": u}}, any_float, st.integers(-2, 5)),
    st.just({}),
)
hostile_edits = st.builds(
    lambda terms, kind, extra: {"features": terms, **kind, **extra},
    st.lists(terms, max_size=3),
    kinds,
    st.fixed_dictionaries(
        {}, optional={"mask": masks, "steps": st.fixed_dictionaries({"start": any_int32, "end": any_int32})}
    ),
)
hostile = st.builds(
    lambda fields: messages.generate(**fields),
    st.fixed_dictionaries(
        {"edits": st.lists(hostile_edits, max_size=3)},
        optional={
            "prompt": st.text(max_size=50),
            "seeds": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
            "sampling": st.fixed_dictionaries(
                {},
                optional={
                    "steps": any_int32,
                    "width": any_int32,
                    "height": any_int32,
                    "guidance_scale": any_float,
                    "guidance_rescale": any_float,
                    "negative_prompt": st.text(max_size=5),
                },
            ),
            "features": st.fixed_dictionaries({"saes": st.lists(st.sampled_from(["mid.0", "x"]), max_size=2)}),
            "image": st.fixed_dictionaries({"format": st.integers(-1, 6)}, optional={"quality": any_int32}),
            "request_id": st.text(max_size=200),
        },
    ),
)


@given(hostile)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_any_request_is_served_or_refused_by_field(engine, message):
    from turbolens_server.rpc.errors import RpcError
    from turbolens_server.rpc.validation import RequestLimits, validate_generate

    try:
        valid = validate_generate(message, engine.info, RequestLimits())
    except RpcError as error:
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations
        return
    assert valid.jobs
    for job in valid.jobs:
        for edit in job.edits:
            assert np.isfinite(edit.amount)


# Queue, cancellation, health


def test_a_full_queue_says_when_to_come_back(server):
    with grpc.insecure_channel(server.target) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        calls = [stub.Generate.future(request(seeds=range(16), sampling={"steps": 4})) for _ in range(12)]
        refused = [call for call in calls if call.exception() is not None]
        assert refused
        assert len(refused) < 12
        for call in refused:
            assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            trailing = dict(call.trailing_metadata())
            assert int(trailing["grpc-retry-pushback-ms"]) > 0
            details = status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).details
            assert any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in details)


def test_leaving_a_stream_frees_the_engine_and_the_server_goes_on(lens):
    for event in lens.stream_generate(PROMPT, seeds=list(range(16)), steps=4):
        if isinstance(event, tl.Step):
            break
    assert lens.generate(PROMPT, seed=7, timeout=20).seed == 7


def test_a_deadline_is_an_exception_of_its_own(lens):
    with pytest.raises(tl.DeadlineExceeded):
        lens.generate(PROMPT, seeds=list(range(16)), steps=4, timeout=0.05)


def test_health_and_reflection(server):
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "turbolens.v1.GenerationService", "turbolens.v1.FeatureService", "turbolens.v1.ModelService"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        names = {s.name for s in next(reflection.ServerReflectionInfo(asked)).list_services_response.service}
        assert "turbolens.v1.GenerationService" in names


def test_callers_in_parallel_each_get_their_own(lens, live):
    expected = {
        seed: lens.generate(PROMPT, seed=seed, steer=[tl.add(live["up.0.1"], seed)]).array for seed in (1, 2, 3)
    }
    got = {}

    def call(seed):
        got[seed] = lens.generate(PROMPT, seed=seed, steer=[tl.add(live["up.0.1"], seed)]).array

    threads = [threading.Thread(target=call, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, picture in expected.items():  # two of them shared a batch
        assert np.abs(picture.astype(int) - got[seed]).max() <= 3


def test_provenance_of_the_saes_is_json(lens):
    for sae in lens.model().saes:
        assert json.loads(sae.provenance_json)
        assert len(bytes.fromhex(sae.hash)) == 32


def test_every_place_where_an_sae_could_sit_is_told(lens, engine):
    model, modules = lens.model(), dict(engine.components.unet.named_modules())
    read = {point.name: point for point in model.hook_points}
    other = {point.name: point for point in model.other_hook_points}
    assert not read.keys() & other.keys()
    told = (read | other).values()
    # A z is no module's output: it is told as within that of its layer.
    assert all(point.module.removesuffix(".z") in modules and point.d_model > 0 for point in told)
    transformers = {name for name, module in modules.items() if type(module).__name__ == "Transformer2DModel"}
    assert {point.module for point in told if ".attn" not in point.name} == transformers
    assert other["up.0.1.attn2.0"].module.startswith(read["up.0.1"].module)
