"""What each call sends and what it makes of the answer; the async client is held to the same."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time

import numpy as np
import pytest
from fake_server import D_SAE, HEIGHT, LABELS, SAES, WIDTH, activations, pixels
from PIL import Image

import turbolens as tl
from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import model_service_pb2 as ms
from turbolens_proto.v1 import run_pb2 as run


def test_what_is_left_out_is_left_to_the_server(client, fake):
    picture = client.generate("a star")
    sent = fake.last(gs.GenerateRequest)
    assert len(sent.request_id) == 32  # made here, so that the server knows a repeated attempt
    assert sent == gs.GenerateRequest(
        request_id=sent.request_id,
        run=run.Run(source=run.Source(prompt=run.PromptSource(text="a star")), sampling=run.Sampling()),
        image=run.ImageOptions(format=run.IMAGE_FORMAT_PNG),
    )  # fmt: skip
    assert picture.seed == 4242
    assert picture.latents is None
    assert len(picture.features) == 0


def test_what_is_said_is_sent(client, fake):
    edit = tl.add("up.0.1/3", 8)
    client.generate(
        "", seed=0, steps=2, width=64, height=32, steer=[edit], features=["up.0.1"], format="webp", quality=80,
        latents=True, request_id="mine",
    )  # fmt: skip
    sent = fake.last(gs.GenerateRequest)
    asked = sent.run
    assert asked.source.WhichOneof("kind") == "prompt"  # the empty prompt is a prompt
    assert (list(asked.seeds), asked.sampling.steps, asked.sampling.width, asked.sampling.height) == ([0], 2, 64, 32)
    assert list(asked.edits) == [edit.to_proto()]
    assert list(asked.features.saes) == ["up.0.1"]
    assert (sent.image.format, sent.image.quality) == (run.IMAGE_FORMAT_WEBP, 80)
    assert sent.return_latents
    assert sent.request_id == "mine"


def test_one_seed_one_picture_many_seeds_many(client):
    assert isinstance(client.generate("x", seed=7), tl.Picture)
    pictures = client.generate("x", seeds=range(3))
    assert isinstance(pictures, tl.Pictures)
    assert [p.seed for p in pictures] == [0, 1, 2]
    assert isinstance(client.generate("x", seeds=[7]), tl.Pictures)
    assert client.extract("x", seed=7).seed == 7
    assert [e.seed for e in client.extract("x", seeds=np.array([5, 6]))] == [5, 6]


@pytest.mark.parametrize("number", [3, np.int64(3), np.uint8(3)])
def test_numbers_of_any_whole_type_are_sent(number, client, fake):
    client.generate("x", seed=number, steps=number, width=number, height=number, quality=number, k={"up.0.1": number})
    sent = fake.last(gs.GenerateRequest)
    asked = sent.run
    assert list(asked.seeds) == [3]
    assert (asked.sampling.steps, asked.sampling.width, asked.sampling.height) == (3, 3, 3)
    assert (sent.image.quality, asked.sae_options[0].k) == (3, 3)


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ({"seed": 1.5}, "seed"), ({"seed": True}, "seed"), ({"seeds": [1, 2.5]}, "seed"), ({"seeds": ["3"]}, "seed"),
        ({"steps": 2.0}, "steps"), ({"width": True}, "width"), ({"k": {"up.0.1": 2.0}}, "k of up.0.1"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_whole_are_a_mistake(argument, what, client, fake):
    with pytest.raises(TypeError, match=rf"^{what} is .*whole number"):
        client.generate("x", **argument)
    assert not fake.requests


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"seed": 1, "seeds": [2]}, "not both"),
        ({"seeds": []}, "at least one"),
        ({"seed": 2**63}, "too large"),
        ({"format": "gif"}, "png, jpeg, webp, raw"),
    ],
)
def test_mistakes_that_need_no_server(client, fake, arguments, says):
    with pytest.raises(ValueError, match=says):
        client.generate("x", **arguments)
    assert not fake.requests


@pytest.mark.parametrize("format", ["png", "webp", "raw", "jpeg"])
def test_a_picture_in_every_form(client, format, tmp_path):
    picture = client.generate("x", seed=3, format=format, latents=True)
    assert picture.image.mode == "RGB"
    assert picture.array.shape == (8, 8, 3)
    assert picture.array.dtype == np.uint8
    if format in ("png", "raw"):
        assert np.array_equal(picture.array, pixels(3))
    for name in ("a.png", "a.jpg", "a.webp"):
        picture.save(tmp_path / name)
        assert Image.open(tmp_path / name).size == (8, 8)
    picture.save(str(tmp_path / "same.png"))
    assert tl.Provenance.from_png(tmp_path / "same.png") == picture.provenance
    for name in ("picture", "picture.xyz"):
        with pytest.raises(ValueError, match=r"is no format of pictures; use \.png"):
            picture.save(tmp_path / name)
    if format == "png":
        with_more = (tmp_path / "same.png").read_bytes()
        assert (
            with_more[: len(picture.bytes) - 12] == picture.bytes[:-12]
        )  # the server's own, but for the text before the end
    if format == "webp":
        assert (tmp_path / "a.webp").read_bytes() == picture.bytes
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert "seed=3" in repr(picture)
    assert np.array_equal(picture.latents, np.arange(16).reshape(4, 2, 2))


def test_a_result_tells_how_it_was_made(client):
    edit = tl.add("up.0.1/3", 8, mask=tl.box(0, 0, 0.5, 1))
    picture = client.generate("x" * 60, seed=3, steer=[edit])
    assert picture.prompt == picture.provenance.run.prompt == "x" * 60
    assert picture.provenance.run.steer == (edit,)
    assert picture.warnings == (tl.Warning("PROMPT_CUT", "cut"),)
    assert client.generate("x", seed=3).warnings == ()


def test_extraction_holds_what_fired(client):
    found = client.extract("x", seed=3, steps=2)
    assert list(found) == list(SAES)
    dense = np.stack([activations(3, step) for step in range(2)])
    block = found["up.0.1"]
    assert block.shape == (2, HEIGHT, WIDTH, D_SAE)
    assert np.array_equal(block.to_dense(), dense)
    assert found.provenance.run.prompt == found.prompt == "x"
    with pytest.raises(KeyError, match=r"down\.2\.1, up\.0\.1"):
        found["mid.0"]


@pytest.mark.parametrize(
    ("features", "saes"), [(True, SAES), (["up.0.1"], ["up.0.1"]), ("up.0.1", ["up.0.1"]), (False, [])]
)
def test_features_beside_a_picture(client, features, saes):
    assert list(client.generate("x", seed=3, features=features).features) == list(saes)


def test_labels_come_with_the_first_features_and_are_asked_for_once(client, fake):
    rows = client.extract("x", seed=3)["up.0.1"].top(D_SAE)
    assert {row.feature: row.label for row in rows if row.label} == {
        row.feature: LABELS[row.feature] for row in rows if row.feature in LABELS
    }
    assert any(row.label for row in rows)
    again = client.extract("x", seeds=[4, 5])
    assert any(row.label for row in again[1]["up.0.1"].top(D_SAE))
    client.generate("x", seed=4)
    client.generate("x", seed=4, features=["up.0.1"])
    asked = [request.run.features.labels for request in fake.requests]
    assert asked == [True, False, False, True]  # of another choice of SAEs, nobody knows yet what it holds
    assert len(fake.requests) == 4


def test_a_stream_starts_without_waiting_for_labels_and_has_them(client, fake):
    events = client.stream_features("x", seed=3, steps=2)
    assert isinstance(next(events), tl.Queued)
    assert len(fake.requests) == 1
    blocks = [event.block for event in events if isinstance(event, tl.Features)]
    assert all(any(row.label for row in block.top(D_SAE)) for block in blocks)
    list(client.stream_features("x", seed=3, steps=2))
    assert not fake.last(fs.StreamFeaturesRequest).run.features.labels


def test_a_stream_left_early_asks_for_labels_again(client, fake):
    next(client.stream_features("x", seed=3))
    next(client.stream_features("x", seed=3))
    assert fake.last(fs.StreamFeaturesRequest).run.features.labels


def test_labels_of_a_few_features_are_not_taken_for_all(client, fake):
    for _ in range(2):
        client.extract("x", only="up.0.1/1")
        assert fake.last(fs.ExtractFeaturesRequest).run.features.labels


def test_a_stream_of_pictures(client, fake):
    events = list(client.stream_generate("x", seeds=[1, 2], steps=2, features=["up.0.1"], previews=True))
    assert [type(e) for e in events] == [
        tl.Queued,
        *[tl.Step, tl.Features, tl.Step, tl.Features, tl.PictureReady] * 2,
        tl.Done,
    ]
    assert fake.last(gs.StreamGenerateRequest).previews
    assert events[0].position == 2
    steps = [e for e in events if isinstance(e, tl.Step)]
    assert [(e.seed_index, e.step, e.steps, e.preview is not None) for e in steps] == [
        (0, 0, 2, True), (0, 1, 2, False), (1, 0, 2, True), (1, 1, 2, False),
    ]  # fmt: skip
    assert np.array_equal(steps[0].preview.array, pixels(1))
    block = [e for e in events if isinstance(e, tl.Features)][-1].block
    assert block.steps == (1,)
    assert np.array_equal(block.to_dense()[0], activations(2, 1))
    pictures = [e.picture for e in events if isinstance(e, tl.PictureReady)]
    assert [p.seed for p in pictures] == [1, 2]
    assert events[-1].provenance.model == "fake"


def test_a_stream_of_features(client):
    events = list(client.stream_features("x", seed=1, steps=2, saes=["up.0.1"]))
    assert [type(e) for e in events] == [tl.Queued, tl.Features, tl.Features, tl.Done]
    assert np.array_equal(events[2].block.to_dense()[0], activations(1, 1))


def test_who_reads_a_stream_slowly_is_not_out_of_time(running):
    with tl.connect(running.target, timeout=0.5) as client:
        kinds = []
        for event in client.stream_generate("x", seeds=[1, 2], steps=2):
            kinds.append(type(event))
            time.sleep(0.2)
        assert kinds[-1] is tl.Done
        assert len(kinds) > 4  # all of it took longer than the call may wait

    async def read() -> list[type]:
        async with tl.aio.connect(running.target, timeout=0.5) as client:
            kinds = []
            async for event in client.stream_generate("x", seeds=[1, 2], steps=2):
                kinds.append(type(event))
                await asyncio.sleep(0.2)
            return kinds

    assert asyncio.run(read()) == kinds


def test_a_stream_that_stands_still_is_out_of_time_and_ends_the_run(running, fake):
    fake.on["StreamGenerate"] = lambda context: (context.add_callback(fake.cancelled.set), fake.cancelled.wait(60))
    started = time.monotonic()
    with tl.connect(running.target, timeout=0.2) as client, pytest.raises(tl.DeadlineExceeded, match="longer timeout"):
        list(client.stream_generate("x", seed=1))
    assert fake.cancelled.wait(30)
    fake.cancelled.clear()

    async def read() -> None:
        async with tl.aio.connect(running.target) as client:
            async for _ in client.stream_generate("x", seed=1, timeout=0.2):
                pass

    with pytest.raises(tl.DeadlineExceeded, match="did not answer in time"):
        asyncio.run(read())
    assert fake.cancelled.wait(30)
    assert time.monotonic() - started < 30


def test_leaving_a_stream_cancels_the_run(client, fake):
    for _ in client.stream_generate("x", seeds=range(1000), steps=4):
        break
    assert fake.cancelled.wait(30)


def test_leaving_an_async_stream_cancels_the_run(running):
    async def leave():
        async with tl.aio.connect(running.target) as lens:
            async for _ in lens.stream_generate("x", seeds=range(1000), steps=4):
                break
            return await asyncio.to_thread(running.fake.cancelled.wait, 30)

    assert asyncio.run(leave())


def test_cancelling_an_async_call_is_the_callers_own_exception(running):
    started = threading.Event()
    release = threading.Event()

    def hold(_):
        started.set()
        release.wait(5)

    async def cancel():
        async with tl.aio.connect(running.target) as lens:
            task = asyncio.create_task(lens.generate("x"))
            await asyncio.to_thread(started.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    running.fake.on["Generate"] = hold
    asyncio.run(cancel())
    release.set()


def test_search_results_go_straight_into_edits(client, fake):
    found = client.search_features("blue", block="up.0.1", limit=3)
    sent = fake.last(fs.SearchFeaturesRequest)
    assert (sent.query, list(sent.saes), sent.page_size) == ("blue", ["up.0.1"], 3)
    assert [str(match.ref) for match in found] == ["up.0.1/1"]
    assert (found[0].feature.label, found[0].reason) == ("blue", "color=blue: word")
    client.generate("x", seed=1, steer=[tl.add(found[0], 4), tl.ablate(found)])
    assert [e.features[0].feature.index for e in fake.last(gs.GenerateRequest).run.edits] == [1, 1]
    assert len(client.search_features("blue")) == len(SAES)
    assert not client.search_features("nothing of the kind")


def test_listing_goes_through_every_page(client, fake):
    every = list(client.list_features("up.0.1", filter="frequency > 0", order_by="mean desc"))
    assert [feature.ref.index for feature in every] == list(range(D_SAE))
    pages = [r for r in fake.requests if isinstance(r, fs.ListFeaturesRequest)]
    assert [r.page_token for r in pages] == ["", "7", "14"]
    assert {(r.parent, r.filter, r.order_by) for r in pages} == {("saes/up.0.1", "frequency > 0", "mean desc")}


def test_listing_asks_for_no_page_that_is_not_read(client, fake):
    next(client.list_features("up.0.1"))
    assert len(fake.requests) == 1


@pytest.mark.parametrize("asked", [("up.0.1", 5), ("up.0.1/5",), (("up.0.1", 5),), (tl.feature("up.0.1", 5),)])
def test_one_feature_in_any_form(client, asked):
    feature = client.get_feature(*asked)
    assert feature.ref == tl.feature("up.0.1", 5)
    assert (feature.label, feature.mean, feature.frequency) == ("night", 1.5, 0.25)
    assert [(lb.attribute, lb.value) for lb in feature.labels] == [("color", "night")]
    assert feature.examples == (tl.Example("a blue star", seed=9, steps=2, step=1, y=1, x=2, activation=3.5),)


def test_the_model_is_asked_for_once(client, fake):
    assert client.model().name == client.model().name == "fake"
    assert len([r for r in fake.requests if isinstance(r, ms.GetModelRequest)]) == 1


def test_the_two_clients_have_one_surface():
    def surface(cls):
        return {n: m for n, m in vars(cls).items() if not n.startswith("_")}

    sync, other = surface(tl.Lens), surface(tl.aio.AsyncLens)
    assert sync.keys() == other.keys()
    for name, method in sync.items():
        ours, theirs = inspect.signature(method), inspect.signature(other[name])
        assert ours.parameters == theirs.parameters, name
        assert inspect.iscoroutinefunction(other[name]) or inspect.isasyncgenfunction(other[name]), name
    assert inspect.signature(tl.connect).parameters == inspect.signature(tl.aio.connect).parameters


def test_the_async_client_gives_the_same(running, client):
    async def everything():
        async with tl.aio.connect(running.target) as lens:
            picture, found, matches, model, feature = await asyncio.gather(
                lens.generate("x", seed=1, features=True), lens.extract("x", seeds=[1, 2]),
                lens.search_features("blue"), lens.model(), lens.get_feature("up.0.1", 5),
            )  # fmt: skip
            streams = [
                [type(e) async for e in lens.stream_generate("x", seed=1, features=True)],
                [type(e) async for e in lens.stream_features("x", seed=1)],
            ]
            listed = [f async for f in lens.list_features("up.0.1")]
        return picture, found, matches, model, feature, streams, listed

    picture, found, matches, model, feature, streams, listed = asyncio.run(everything())
    same = client.generate("x", seed=1, features=True)
    assert picture.bytes == same.bytes
    assert picture.features["up.0.1"].top(5) == same.features["up.0.1"].top(5)
    assert [e.seed for e in found] == [1, 2]
    assert matches == client.search_features("blue")
    assert model == client.model()
    assert feature == client.get_feature("up.0.1", 5)
    assert streams[0] == [type(e) for e in client.stream_generate("x", seed=1, features=True)]
    assert streams[1] == [type(e) for e in client.stream_features("x", seed=1)]
    assert listed == list(client.list_features("up.0.1"))


def test_references_are_sent_with_every_call_and_told_again(client, fake):
    references = {"other": tl.reference("a ring"), "seeded": tl.reference("", seed=np.int64(3))}
    arguments = {"seed": 1, "steer": [tl.patch("up.0.1", "other")], "references": references}
    told = client.generate("x", **arguments).provenance.run
    list(client.stream_generate("x", **arguments))
    client.extract("x", **arguments)
    list(client.stream_features("x", **arguments))
    expected = {
        "other": run.Reference(source={"prompt": {"text": "a ring"}}),
        "seeded": run.Reference(source={"prompt": {"text": ""}}, seed=3),
    }
    assert [dict(request.run.references) for request in fake.requests] == [expected] * 4
    assert told == tl.Run(prompt="x", seeds=(1,), steer=(tl.patch("up.0.1", "other"),), references=references)


@pytest.mark.parametrize("references", [[tl.reference("x")], {"other": "a ring"}])
def test_references_have_names(references, client, fake):
    with pytest.raises(TypeError, match="references are named"):
        client.generate("x", references=references)
    assert not fake.requests


@pytest.mark.parametrize("steer", [None, "up.0.1/3", tl.add("up.0.1/3", 1), ["up.0.1/3"]])
def test_edits_are_a_list(steer, client, fake):
    with pytest.raises(TypeError, match="give a list of edits"):
        client.generate("x", steer=steer)
    assert not fake.requests


@pytest.mark.parametrize("regions", [None, 3, (tl.box(0, 0, 1, 1), "a ring"), ["a ring"]])
def test_regions_are_masks_with_phrases(regions, client, fake):
    with pytest.raises(TypeError, match="regions are masks with phrases"):
        client.generate("x", regions=regions)
    assert not fake.requests


def test_a_server_that_passes_over_more_prompts_is_told_of(client):
    """The fake one does: it draws the first alone."""
    with pytest.raises(tl.Unimplemented, match="1 of 2 results"):
        client.generate(["a star", "a ring"], seed=1)
    with pytest.raises(tl.Unimplemented, match="2 of 4 results"):
        client.extract(["a star", "a ring"], seeds=[1, 2])
    with pytest.raises(tl.Unimplemented, match="1 of 2 results"):
        list(client.stream_generate(["a star", "a ring"], seed=1))
