"""Every RPC over a real socket, on an engine without a model."""

from __future__ import annotations

import asyncio
import io
import threading

import grpc
import numpy as np
import pytest
import torch
from fake_engine import D_SAE, FakeEngine, a_gate, a_nested_bundle, an_info
from PIL import Image

from tests import messages
from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import model_service_pb2 as ms
from turbolens_proto.v1 import run_pb2 as run
from turbolens_proto.v1 import steering_pb2 as steering
from turbolens_server.engine.info import LoraInfo, SaeInfo
from turbolens_server.rpc import convert, servicers
from turbolens_server.rpc.validation import RequestLimits, validate_generate


def a_request(**fields) -> gs.GenerateRequest:
    return messages.generate(**{"prompt": "a star", "seeds": [7], **fields})


async def test_the_model_is_told_with_every_limit(running):
    model = (await running.models.GetModel(ms.GetModelRequest())).model
    assert (model.name, model.hash, model.backend, model.dtype) == ("fake", "hash of fake", "fake", "float32")
    assert model.components_hash == "hash of the rest"
    assert model.backend_reason == "no other fits"
    assert [(p.name, p.height, p.width) for p in model.hook_points] == [("mid.0", 4, 4), ("up.0.1", 4, 4)]
    assert [list(sae.units) for sae in model.saes] == [
        [steering.UNIT_RAW, steering.UNIT_MEAN, steering.UNIT_NORM, steering.UNIT_REFERENCE],
        [steering.UNIT_RAW, steering.UNIT_REFERENCE],
    ]
    limits = model.limits
    assert (limits.max_prompt_chars, limits.max_seeds, limits.max_steps) == (4000, 16, 4)
    assert limits.max_message_bytes == 64 * 2**20
    assert (limits.max_batch, limits.max_queue, limits.max_queue_pictures) == (8, 2, 256)
    unset = [field.name for field in ms.Limits.DESCRIPTOR.fields if not getattr(limits, field.name)]
    assert not unset
    memory = model.memory
    assert (memory.weights_bytes, memory.sae_bytes, memory.activation_bytes, memory.available_bytes) == (4, 3, 2, 100)
    assert model.load_seconds == 1.5
    assert [(s.width, s.height) for s in limits.sizes] == [(64, 64), (64, 32)]


async def test_the_scheduler_and_what_is_fused_are_told(loading):
    info = an_info(
        scheduler="LCMScheduler", timestep_spacing="leading", timesteps=(399,), takes_timesteps=True, previews=True,
        embedded_guidance=8.0, loras=(LoraInfo("style", 0.5, "its hash"),),
    )  # fmt: skip
    await loading.serving.make_ready(FakeEngine(info))
    model = (await loading.models.GetModel(ms.GetModelRequest())).model
    assert model.scheduler == ms.Scheduler(
        name="LCMScheduler", timestep_spacing="leading", previews=True, takes_timesteps=True, train_timesteps=1000,
        timesteps=[399], embedded_guidance=8,
    )  # fmt: skip
    lora = run.Lora(name="style", weight=0.5, hash="its hash")
    assert list(model.loras) == [lora]
    assert list((await loading.generation.Generate(a_request())).provenance.loras) == [lora]


@pytest.fixture
async def nested(loading):
    """A server of one SAE that leaves a choice of k and prefix."""
    sae = SaeInfo("mid.0", "mid.0", a_nested_bundle("mid.0"), forced=False)
    await loading.serving.make_ready(FakeEngine(an_info(saes={"mid.0": sae})))
    return loading


async def test_an_sae_tells_what_a_request_may_choose(nested):
    (sae,) = (await nested.models.GetModel(ms.GetModelRequest())).model.saes
    assert (sae.architecture, sae.k, sae.k_max, list(sae.prefixes)) == ("turbolens-matryoshka", 2, 4, [4, 8, D_SAE])


async def test_how_saes_are_read_is_in_the_provenance_of_every_call(nested):
    asked = [run.SaeOptions(sae="mid.0", k=3, prefix=8)]
    fields = {"prompt": "x", "features": {}, "sae_options": asked}
    told = [
        (await nested.generation.Generate(messages.generate(**fields))).provenance,
        (await nested.features.ExtractFeatures(messages.extract(**fields))).provenance,
    ]
    for stream in (
        nested.generation.StreamGenerate(messages.stream_generate(**fields)),
        nested.features.StreamFeatures(messages.stream_features(**fields)),
    ):
        told.append([event async for event in stream][-1].done.provenance)
    assert [list(provenance.run.sae_options) for provenance in told] == [asked] * 4


async def test_a_k_that_an_sae_does_not_allow_is_refused_by_every_call_before_any_work(nested):
    wrong = {"prompt": "x", "features": {}, "sae_options": [{"sae": "mid.0", "k": 5}]}
    for call in (
        nested.generation.Generate(messages.generate(**wrong)),
        nested.features.ExtractFeatures(messages.extract(**wrong)),
        nested.generation.StreamGenerate(messages.stream_generate(**wrong)).read(),
        nested.features.StreamFeatures(messages.stream_features(**wrong)).read(),
    ):
        says = r"run.sae_options\[0\].k: got 5; mid.0 allows 1 to 4"
        with pytest.raises(grpc.aio.AioRpcError, match=says) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not nested.engine.batches


async def test_pictures_come_in_order_over_several_batches_of_one_thread(running):
    answer = await running.generation.Generate(
        a_request(seeds=range(20, 36), image={"format": run.IMAGE_FORMAT_RAW}, request_id="mine", return_latents=True)
    )
    assert running.engine.batches == [list(range(20, 28)), list(range(28, 36))]
    assert len(running.engine.threads) == 1
    assert answer.request_id == "mine"
    assert [g.seed for g in answer.generations] == list(range(20, 36))
    for made in answer.generations:
        picture = np.frombuffer(made.image.data, np.uint8).reshape(64, 64, 3)
        assert (picture == np.random.default_rng(made.seed).integers(0, 255, (64, 64, 3))).all()
        assert list(made.latents.shape) == [4, 8, 8]
        assert np.frombuffer(made.latents.data, "<f4")[0] == made.seed % 7
        assert not made.features


@pytest.mark.parametrize(("kind", "name"), [(0, "PNG"), (1, "PNG"), (2, "JPEG"), (3, "WEBP")])
async def test_pictures_are_coded_as_asked(kind, name, running):
    image = (await running.generation.Generate(a_request(image={"format": kind}))).generations[0].image
    assert Image.open(io.BytesIO(image.data)).format == name
    assert (image.width, image.height) == (64, 64)
    assert run.ImageFormat.Name(image.format) == f"IMAGE_FORMAT_{name}"


async def test_provenance_says_all_and_warnings_what_was_cut(running):
    edit = {"features": [{"feature": {"sae": "mid.0", "index": 1}}], "add": {"strength": 2}}
    answer = await running.generation.Generate(a_request(prompt="word " * 23, edits=[edit]))
    told = answer.provenance
    assert (told.model, told.model_hash, told.backend, told.device, told.dtype) == (
        "fake", "hash of fake", "fake", "cpu", "float32",
    )  # fmt: skip
    assert told.components_hash == "hash of the rest"
    assert dict(told.sae_hashes) == {"mid.0": "hash of mid.0"}
    assert told.run.source.prompt.text == "word " * 23
    assert told.run.sampling == run.Sampling(steps=1, width=64, height=64, guidance_scale=0)
    assert told.run.edits[0].add.strength == 2
    assert list(told.run.seeds) == [7]
    assert dict(told.versions) == {"turbolens": "0"}
    (warning,) = answer.warnings
    assert warning.code == "PROMPT_CUT"
    assert "last 3 tokens" in warning.message


@pytest.mark.parametrize(
    ("seeds", "says"),
    [
        ([7, 7], None),
        ([7, 2**31 + 7], None),
        ([7, 2**32 + 7], "seeds 7 and 4294967303 draw the same noise"),
        ([2**63 - 1, 5, 2**32 - 1], "seeds 9223372036854775807 and 4294967295 draw the same noise"),
    ],
)
async def test_seeds_that_draw_the_same_noise_are_told(running, seeds, says):
    for answer in (
        await running.generation.Generate(messages.generate(prompt="x", seeds=seeds)),
        await running.features.ExtractFeatures(messages.extract(prompt="x", seeds=seeds)),
    ):
        found = [warning.message for warning in answer.warnings if warning.code == "SEEDS_COLLIDE"]
        assert [says in message for message in found] == [True] * (says is not None)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"add": {"strength": 4}}, None),
        ({"add": {}}, "add of mid.0/1: strength 0 changes nothing; an amount that is left out is 0"),
        ({"scale": {"factor": 1}}, "scale of mid.0/1: factor 1 changes nothing"),
        ({"scale": {}}, None),  # ablates
        ({"set": {}}, None),
        ({"add": {}, "steps": {"start": 0, "end": 1}}, None),  # one step of a schedule
    ],
)
async def test_an_edit_that_changes_nothing_is_told(running, edit, says):
    features = [{"feature": {"sae": "mid.0", "index": 1}}]
    both = [{"features": features, **one} for one in ({"scale": {"factor": 2}}, edit)]
    answer = await running.generation.Generate(messages.generate(prompt="x", seeds=[1], edits=both))
    assert [w.message for w in answer.warnings if w.code == "NO_EFFECT"] == ([says] if says else [])


def test_the_same_low_bits_are_the_same_noise():
    """What the warning rests on."""
    one, other = (torch.randn(9, generator=torch.Generator().manual_seed(seed)) for seed in (7, 2**32 + 7))
    assert torch.equal(one, other)


async def test_a_late_start_is_told_with_the_runs_that_have_it(loading):
    info = an_info(late_starts={1: 1}, timestep_spacing="leading", scheduler="Euler")
    await loading.serving.make_ready(FakeEngine(info))
    late = await loading.generation.Generate(a_request())
    assert [warning.code for warning in late.warnings] == ["LATE_START"]
    assert "timestep_spacing='leading' of Euler starts 1 step at timestep 1 of 1000" in late.warnings[0].message
    assert not (await loading.generation.Generate(a_request(sampling={"steps": 2}))).warnings


@pytest.mark.parametrize(("strides", "most"), [((16,), 8), ((), 0)])
async def test_a_model_tells_whether_it_serves_regions(loading, strides, most):
    await loading.serving.make_ready(FakeEngine(an_info(region_strides=strides)))
    assert (await loading.models.GetModel(ms.GetModelRequest())).model.limits.max_regions == most


async def test_a_model_tells_of_its_gates_and_a_result_that_they_took_part(loading):
    await loading.serving.make_ready(FakeEngine(an_info(gate=a_gate())))
    told = (await loading.models.GetModel(ms.GetModelRequest())).model
    assert (told.gate.hash, list(told.gate.layers), told.gate.forced) == ("hash of gates", ["mid.0.attn2.0"], True)
    assert (told.gate.threshold, told.gate.closed, told.gate.provenance_json) == (0.5, -1e4, '{"recipe": "fake"}')
    made = (await loading.generation.Generate(a_request(gate=True))).provenance
    assert (made.gate_hash, made.forced_gate, made.run.gate) == ("hash of gates", True, True)
    plain = (await loading.generation.Generate(a_request())).provenance
    assert (plain.gate_hash, plain.forced_gate, plain.run.gate) == ("", False, False)


async def test_a_model_that_looks_made_for_guidance_warns_of_runs_without_it(loading):
    await loading.serving.make_ready(FakeEngine(an_info(made_for_guidance=True, scheduler="Euler")))
    plain = await loading.generation.Generate(a_request())
    assert [warning.code for warning in plain.warnings] == ["NO_GUIDANCE"]
    assert "this was 1 step without: try guidance_scale=5 and steps=25" in plain.warnings[0].message
    guided = await loading.generation.Generate(a_request(sampling={"guidance_scale": 5}))
    assert not guided.warnings
    assert guided.provenance.run.sampling.guidance_scale == 5


async def test_a_unet_that_hears_its_guidance_takes_no_other(loading):
    await loading.serving.make_ready(FakeEngine(an_info(takes_guidance=False, embedded_guidance=8.0)))
    assert (await loading.models.GetModel(ms.GetModelRequest())).model.limits.max_guidance_scale == 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await loading.generation.Generate(a_request(sampling={"guidance_scale": 5}))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "hears its guidance, set to 8" in caught.value.details()


async def test_an_answer_that_no_message_holds_is_refused_before_any_work(loading):
    """Where it was not known before, it is one line all the same."""
    big = (2048, 2048)
    engine = FakeEngine(an_info(sizes=(big,), default_size=big))
    await loading.serving.make_ready(engine)
    raw = {"format": run.IMAGE_FORMAT_RAW}
    with pytest.raises(grpc.aio.AioRpcError, match=r"the answer would have about 72 MiB, a message holds 64; ask for"):
        await loading.generation.Generate(a_request(seeds=range(6), image=raw))
    assert not engine.batches
    stream = messages.stream_generate(prompt="x", seeds=range(6), image=raw)
    assert len(validate_generate(stream, engine.info, RequestLimits()).jobs) == 6


async def test_an_answer_that_turns_out_too_large_is_one_line(running, monkeypatch):
    monkeypatch.setattr(servicers, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(grpc.aio.AioRpcError, match=r"the answer has 0\.\d MiB, a message holds .*; ask for") as caught:
        await running.generation.Generate(a_request())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_seed_is_drawn_and_told(running):
    seeds = {(await running.generation.Generate(messages.generate(prompt=""))).generations[0].seed for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)


async def extract(running, **selection) -> list[run.SparseFeatures]:
    answer = await running.features.ExtractFeatures(
        messages.extract(prompt="x", seeds=[1], sampling={"steps": 2}, features=selection)
    )
    return list(answer.extractions[0].features)


async def test_features_are_packed_as_the_contract_says(running):
    found = await extract(running)
    assert [(f.step, f.sae) for f in found] == [(s, b) for s in (0, 1) for b in ("mid.0", "up.0.1")]
    one = found[0]
    counts, entries = np.frombuffer(one.counts, "<u2"), 15
    assert (one.height, one.width, one.d_sae) == (4, 4, D_SAE)
    assert counts.tolist() == [i % 3 for i in range(16)]
    assert len(np.frombuffer(one.indices, "<u2")) == len(np.frombuffer(one.values, "<f2")) == counts.sum() == entries
    assert one.value_type == run.VALUE_TYPE_FLOAT16
    (full, _) = await extract(running, saes=["up.0.1"], value_type=run.VALUE_TYPE_FLOAT32)
    assert np.frombuffer(full.values, "<f4") == pytest.approx(np.linspace(0.5, 1.5, entries))


async def test_only_named_features_come(running):
    (one, _) = await extract(running, saes=["mid.0"], only=[{"sae": "mid.0", "index": 2}])
    assert set(np.frombuffer(one.indices, "<u2")) == {2}
    assert np.frombuffer(one.counts, "<u2").tolist() == [0, 0, 1] + [0] * 13
    both = await extract(running, only=[{"sae": "mid.0", "index": 2}])
    assert [len(f.values) > 0 for f in both[:2]] == [True, False]


async def test_wide_dictionaries_have_wide_indices(loading):
    import dataclasses

    from fake_engine import a_bundle

    bundle = a_bundle("mid.0", stats=False, d_sae=2**16 + 1)
    info = dataclasses.replace(an_info(), saes={"mid.0": SaeInfo("mid.0", "mid.0", bundle, forced=True)})
    await loading.serving.make_ready(FakeEngine(info))
    answer = await loading.features.ExtractFeatures(messages.extract(prompt="x"))
    (one,) = answer.extractions[0].features
    assert len(np.frombuffer(one.indices, "<u4")) == 15
    assert answer.provenance.forced_sae


async def test_a_value_past_float16_is_refused_with_advice(running):
    running.engine.peak = 70_000
    with pytest.raises(grpc.aio.AioRpcError, match="VALUE_TYPE_FLOAT32") as caught:
        await extract(running)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    (full, _) = await extract(running, saes=["mid.0"], value_type=run.VALUE_TYPE_FLOAT32)
    assert np.frombuffer(full.values, "<f4").max() == 70_000


async def test_a_value_below_float16_stays_positive(running):
    running.engine.peak = 1e-9  # the last of the falling activations
    (half, _) = await extract(running, saes=["mid.0"])
    values = np.frombuffer(half.values, "<f2")
    assert values.min() == np.finfo(np.float16).smallest_subnormal > 0
    assert values[:-1] == pytest.approx(np.linspace(0.5, 0, 15)[:-1], rel=1e-3)
    (full, _) = await extract(running, saes=["mid.0"], value_type=run.VALUE_TYPE_FLOAT32)
    assert np.frombuffer(full.values, "<f4").min() == np.float32(1e-9)


async def test_a_stream_of_pictures_tells_all_as_it_happens(running):
    running.engine.gate.clear()
    request = messages.stream_generate(
        prompt="x", seeds=[1, 2], sampling={"steps": 2}, features={"saes": ["mid.0"]}, previews=True
    )
    stream = aiter(running.generation.StreamGenerate(request))
    first = await anext(stream)
    assert first.queued.position == 0
    assert len(first.queued.request_id) == 32
    running.engine.gate.set()
    events = [event async for event in stream]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["features", "step"] * 4 + ["picture"] * 2 + ["done"]
    steps = [event.step for event in events if event.WhichOneof("event") == "step"]
    assert [(s.seed_index, s.step, s.steps, bool(s.preview.data)) for s in steps] == [
        (0, 0, 2, True), (1, 0, 2, True), (0, 1, 2, False), (1, 1, 2, False),
    ]  # fmt: skip
    assert [event.picture.generation.seed for event in events if event.WhichOneof("event") == "picture"] == [1, 2]
    assert events[-1].done.provenance.model == "fake"


async def test_a_stream_of_features_tells_all(running):
    request = messages.stream_features(prompt="x", seeds=range(9))
    events = [event async for event in running.features.StreamFeatures(request)]
    assert [event.WhichOneof("event") for event in events] == ["queued"] + ["features"] * 18 + ["done"]
    assert [event.features.seed_index for event in events[1:-1]] == [i for i in range(9) for _ in range(2)]


async def test_features_are_packed_off_the_event_loop_in_calls_and_streams(running, monkeypatch):
    threads = []

    def packed(codes, selection):
        threads.append(threading.current_thread())
        return pack(codes, selection)

    pack = convert.sparse_features
    monkeypatch.setattr(convert, "sparse_features", packed)
    await extract(running)
    request = messages.stream_features(prompt="x")
    packed_features = [event async for event in running.features.StreamFeatures(request)]
    request = messages.stream_generate(prompt="x", features={})
    packed_pictures = [event async for event in running.generation.StreamGenerate(request)]
    assert [e.features.features.sae for e in packed_features if e.HasField("features")] == ["mid.0", "up.0.1"]
    assert [e.features.features.sae for e in packed_pictures if e.HasField("features")] == ["mid.0", "up.0.1"]
    assert len(threads) == 2 * 2 + 2 + 2
    assert threading.current_thread() not in threads  # the loop's, in this test


async def test_features_are_listed_found_and_got(running):
    page = await running.features.ListFeatures(fs.ListFeaturesRequest(parent="saes/mid.0", page_size=5))
    assert (len(page.features), page.total_size) == (5, D_SAE)
    rest = await running.features.ListFeatures(
        fs.ListFeaturesRequest(parent="saes/mid.0", page_size=5000, page_token=page.next_page_token)
    )
    assert [f.ref.index for f in rest.features] == list(range(5, D_SAE))
    assert not rest.next_page_token
    name = "saes/mid.0/features/3"
    got = (await running.features.GetFeature(fs.GetFeatureRequest(name=name))).feature
    assert (got.name, got.ref.index) == (name, 3)
    assert got.max == pytest.approx(3 * got.mean)
    assert not (await running.features.SearchFeatures(fs.SearchFeaturesRequest(query="blue"))).matches
    assert len(running.engine.threads) == 1  # words are embedded where the engine runs


@pytest.mark.parametrize("name", ["saes/mid.0/features/16", "saes/none/features/1", "mid.0", "saes/mid.0/features/٣"])
async def test_names_of_nothing_are_not_found(name, running):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.features.GetFeature(fs.GetFeatureRequest(name=name))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.features.ListFeatures(fs.ListFeaturesRequest(parent=name))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_answers_while_the_engine_works(running):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    running.engine.gate.clear()
    call = asyncio.ensure_future(running.generation.Generate(a_request()))
    await asyncio.to_thread(running.engine.started.wait)
    health = health_pb2_grpc.HealthStub(running.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service="turbolens.v1.GenerationService"), timeout=30)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    running.engine.gate.set()
    assert len((await call).generations) == 1


async def test_what_is_known_of_model_and_features_is_told_while_the_engine_works(running):
    running.engine.gate.clear()
    call = asyncio.ensure_future(running.generation.Generate(a_request()))
    await asyncio.to_thread(running.engine.started.wait)
    assert (await running.models.GetModel(ms.GetModelRequest(), timeout=30)).model.name == "fake"
    listed = await running.features.ListFeatures(fs.ListFeaturesRequest(parent="saes/mid.0"), timeout=30)
    name = listed.features[0].name
    assert (await running.features.GetFeature(fs.GetFeatureRequest(name=name), timeout=30)).feature.name == name
    await running.features.NearestFeatures(fs.NearestFeaturesRequest(name=name), timeout=30)
    assert not call.done()
    running.engine.gate.set()
    await call
