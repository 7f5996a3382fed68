"""From requests to jobs, or to the whole list of what is wrong with them; pure functions, no engine."""

from __future__ import annotations

import dataclasses
import io

import grpc
import numpy as np
import pytest
import torch
from fake_engine import D_SAE, DEAD, a_bundle, a_gate, a_nested_bundle, an_info
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests import messages
from tests.pace import fastest_s
from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import run_pb2 as run
from turbolens_proto.v1 import steering_pb2 as steering
from turbolens_server.engine.info import SaeInfo
from turbolens_server.engine.types import Reference, SaeOptions
from turbolens_server.rpc.errors import RpcError
from turbolens_server.rpc.validation import RequestLimits, validate_attribute, validate_extract, validate_generate
from turbolens_server.rpc.validation.answer import features_bytes
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.kinds import KINDS
from turbolens_server.unet.points import HookPoint

INFO, LIMITS = an_info(), RequestLimits()
_PLAIN = INFO.saes["up.0.1"]
NESTED = an_info(
    saes={
        "mid.0": dataclasses.replace(INFO.saes["mid.0"], bundle=a_nested_bundle("mid.0")),
        "up.0.1": _PLAIN,
        "jump": dataclasses.replace(_PLAIN, name="jump", bundle=dataclasses.replace(_PLAIN.bundle, k=None)),
    }
)
"""One SAE that leaves a choice, one of a fixed k, one of none."""


def a_request(*edits, **fields) -> gs.GenerateRequest:
    return messages.generate(**{"prompt": "x", "seeds": [7], "edits": edits, **fields})


def an_edit(index=1, sae="mid.0", **fields) -> dict:
    kind = {} if fields.keys() & KINDS.keys() else {"add": {"strength": 1.0}}
    return {"features": [{"feature": {"sae": sae, "index": index}}], **kind, **fields}


def boxes(*edges, mask="boxes") -> dict:
    return {"boxes": {"boxes": [dict(zip(("left", "top", "right", "bottom"), e, strict=True)) for e in edges]}}


def polygon(*points) -> dict:
    return {"polygons": {"polygons": [{"points": [{"x": x, "y": y} for x, y in points]}]}}


def a_region(**fields) -> dict:
    return {"mask": boxes((0, 0, 0.5, 1)), "prompt": "a red ring", **fields}


def png(array) -> dict:
    file = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(file, "PNG")
    return {"png": file.getvalue()}


def violations(request, info=INFO) -> dict[str, str]:
    with pytest.raises(RpcError) as caught:
        validate_generate(request, info, LIMITS)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    return {v.field: v.description for v in caught.value.violations}


def where(sae="mid.0", index=1, **rule):
    return {"feature": {"sae": sae, "index": index}, **rule}


NAN, INF = float("nan"), float("inf")
MEANS = np.full(16, 3000, np.float32)
UNIT_RAW, UNIT_NORM = steering.UNIT_RAW, steering.UNIT_NORM
A_RUN = {"source": {"prompt": {"text": "y"}}}
MANY = [{"feature": {"sae": "mid.0", "index": i}} for i in range(1024)]
SQUARE = ((0.1, 0.1), (0.9, 0.1), (0.9, 0.9))


@pytest.mark.parametrize(
    ("request_", "field", "says"),
    [
        (messages.generate(), "run.source", "missing"),
        (a_request(prompt="x" * 4001), "run.source.prompt.text", "4000"),
        (a_request(request_id="a\nb"), "request_id", "printable"),
        (a_request(request_id="x" * 129), "request_id", "128"),
        (a_request(seeds=[0, -1]), "run.seeds[1]", "got -1"),
        (a_request(seeds=range(17)), "run.seeds", "16"),
        (a_request(sampling={"steps": 5}), "run.sampling.steps", "got 5; must be 1 to 4"),
        (a_request(sampling={"steps": 0}), "run.sampling.steps", "1 to 4"),
        (a_request(sampling={"width": 32}), "run.sampling.width", "64x64, 64x32"),
        (a_request(sampling={"height": 65}), "run.sampling.height", "64x64"),
        (a_request(sampling={"guidance_scale": NAN}), "run.sampling.guidance_scale", "0 or 1 for none"),
        (a_request(sampling={"guidance_scale": 0.5}), "run.sampling.guidance_scale", "more than 1 and at most 100"),
        (a_request(sampling={"guidance_scale": -3}), "run.sampling.guidance_scale", "more than 1 and at most 100"),
        (a_request(sampling={"guidance_scale": 101}), "run.sampling.guidance_scale", "at most 100"),
        (a_request(sampling={"guidance_scale": 5, "guidance_rescale": 1.1}), "run.sampling.guidance_rescale", "0 to 1"),
        (a_request(sampling={"guidance_scale": 5, "guidance_rescale": NAN}), "run.sampling.guidance_rescale", "0 to 1"),
        (a_request(sampling={"guidance_rescale": 0.5}), "run.sampling.guidance_rescale", "nothing without guidance"),
        (a_request(sampling={"negative_prompt": ""}), "run.sampling.negative_prompt", "nothing without guidance"),
        (
            a_request(sampling={"guidance_scale": 5, "negative_prompt": "x" * 4001}),
            "run.sampling.negative_prompt",
            "4000",
        ),
        (
            a_request(
                an_edit(set={"value": 1, "unit": 4}, reference="a"),
                *(an_edit(set={"value": 1, "unit": 4}, reference=name) for name in "bcd"),
                sampling={"guidance_scale": 5},
                references=dict.fromkeys("abcd", A_RUN),
            ),
            "run.sampling.guidance_scale",
            "and its 4 references takes 10 lanes, and a batch holds 8",
        ),
        (a_request(regions=[{"prompt": "x"}]), "run.regions[0].mask", "heard everywhere belongs in the prompt"),
        (a_request(regions=[{"mask": boxes((0, 0, 1, 1))}]), "run.regions[0].prompt", "is empty"),
        (a_request(regions=[a_region(prompt="x" * 4001)]), "run.regions[0].prompt", "4000"),
        (a_request(regions=[a_region(), a_region(mask={})]), "run.regions[1].mask.shape", "boxes, polygons or a png"),
        (
            a_request(regions=[a_region(mask=boxes((0.5, 0, 0, 1)))]),
            "run.regions[0].mask.boxes.boxes[0]",
            "left < right",
        ),
        (a_request(regions=[a_region(mask=png(np.zeros((4, 4))))]), "run.regions[0].mask.png", "black everywhere"),
        (a_request(regions=[a_region()] * 9), "run.regions", "got '9 regions'; at most 8"),
        (
            a_request(an_edit(mask=boxes(*[(0, 0, 1, 1)] * 200)), regions=[a_region(mask=boxes(*[(0, 0, 1, 1)] * 57))]),
            "run.edits[0].mask.boxes.boxes",
            "257 shapes",
        ),
        (a_request(an_edit(side=2)), "run.edits[0].side", "got 'contrast'; a run without guidance has no sides"),
        (a_request(an_edit(side=1)), "run.edits[0].side", "without guidance"),
        (a_request(an_edit(side=4), sampling={"guidance_scale": 5}), "run.edits[0].side", "SIDE_BOTH"),
        (
            a_request(an_edit(set={"value": 1}, side=2), sampling={"guidance_scale": 5}),
            "run.edits[0].side",
            "set has no opposite; add and scale have",
        ),
        (a_request(image={"format": 9}), "image.format", "IMAGE_FORMAT_PNG"),
        (a_request(image={"quality": 90}), "image.quality", "JPEG"),
        (a_request(image={"format": 4, "quality": 90}), "image.quality", "JPEG"),
        (a_request(image={"format": 2, "quality": 0}), "image.quality", "1 to 100"),
        (a_request(features={"saes": ["mid.0", "up.9"]}), "run.features.saes[1]", "mid.0, up.0.1"),
        (a_request(features={"only": [{"sae": "mid.0", "index": 16}]}), "run.features.only[0].index", "0 to 15"),
        (
            a_request(features={"saes": ["mid.0"], "only": [{"sae": "up.0.1"}]}),
            "run.features.only[0].sae",
            "selected",
        ),
        (a_request(features={"value_type": -1}), "run.features.value_type", "VALUE_TYPE_FLOAT16"),
        (a_request(*[an_edit()] * 65), "run.edits", "64"),
        (a_request({"add": {"strength": 1}}), "run.edits[0].features", "1 to 1024"),
        (a_request({**an_edit(), "features": an_edit()["features"] * 1025}), "run.edits[0].features", "1 to 1024"),
        (
            a_request({"features": an_edit()["features"]}),
            "run.edits[0].kind",
            "add, scale, set, replace, transfer, patch",
        ),
        (a_request(an_edit(), an_edit(D_SAE)), "run.edits[1].features[0].feature.index", "got 16; must be 0 to 15"),
        (a_request(an_edit(-1)), "run.edits[0].features[0].feature.index", "got -1"),
        (a_request(an_edit(sae="up")), "run.edits[0].features[0].feature.sae", "mid.0, up.0.1"),
        (a_request({**an_edit(), "features": an_edit()["features"] * 2}), "run.edits[0].features[1].feature", "once"),
        (a_request(an_edit(add={"strength": NAN})), "run.edits[0].add.strength", "finite"),
        (a_request(an_edit(scale={"factor": -INF})), "run.edits[0].scale.factor", "finite"),
        (a_request(an_edit(set={"value": 1000.5})), "run.edits[0].set.value", "1000"),
        (
            a_request(an_edit(sae="up.0.1", add={"strength": 1.1e6, "unit": UNIT_RAW})),
            "run.edits[0].add.strength",
            "1e+06",
        ),
        (a_request(an_edit(replace={"strength": 1, "unit": 5})), "run.edits[0].replace.unit", "UNIT_RAW"),
        (
            a_request({**an_edit(), "features": [{**an_edit()["features"][0], "weight": INF}]}),
            "run.edits[0].features[0].weight",
            "finite",
        ),
        (
            a_request({"scale": {}, "features": [{**an_edit()["features"][0], "weight": 1}]}),
            "run.edits[0].features[0].weight",
            "no weights",
        ),
        (a_request(an_edit(DEAD)), "run.edits[0].add.unit", "never active"),
        (a_request(an_edit(sae="up.0.1")), "run.edits[0].add.unit", "no statistics"),
        (
            a_request(an_edit(sae="up.0.1", set={"value": 1, "unit": UNIT_NORM})),
            "run.edits[0].set.unit",
            "no statistics",
        ),
        (a_request(an_edit(steps={"start": 1, "end": 1})), "run.edits[0].steps", "start < end"),
        (a_request(an_edit(steps={"start": 0, "end": 2})), "run.edits[0].steps", "0 to 1"),
        (a_request(an_edit(amounts=[1, 2])), "run.edits[0].amounts", "each of the 1 steps"),
        (a_request(an_edit(amounts=[1])), "run.edits[0].amounts", "in place of add.strength"),
        (a_request(an_edit(amounts=[NAN], add={})), "run.edits[0].amounts[0]", "finite"),
        (
            a_request({"patch": {"hook_points": ["mid.0"]}, "reference": "r", "amounts": [1]}),
            "run.edits[0].amounts",
            "takes none",
        ),
        (a_request(an_edit(condition=where(index=16, above=1))), "run.edits[0].condition.feature.index", "0 to 15"),
        (a_request(an_edit(condition=where(sae="up.0.1", above=1))), "run.edits[0].condition.feature", "of mid.0"),
        (a_request(an_edit(condition=where())), "run.edits[0].condition.rule", "above, below, map"),
        (a_request(an_edit(condition=where(above=NAN))), "run.edits[0].condition.above", "finite"),
        (a_request(an_edit(condition=where(above=-1))), "run.edits[0].condition.above", "at least 0"),
        (a_request(an_edit(condition=where(below=0))), "run.edits[0].condition.below", "more than 0"),
        (a_request(an_edit(condition=where(map=0))), "run.edits[0].condition.map", "more than 0"),
        (a_request(an_edit(condition=where(above=1, unit=UNIT_NORM))), "run.edits[0].condition.unit", "raw and mean"),
        (a_request(an_edit(condition=where(above=1, unit=9))), "run.edits[0].condition.unit", "UNIT_RAW"),
        (a_request(an_edit(mask={})), "run.edits[0].mask.shape", "missing"),
        (a_request(an_edit(mask={"boxes": {}})), "run.edits[0].mask.boxes.boxes", "empty"),
        (a_request(an_edit(mask=boxes((0.5, 0, 0.2, 1)))), "run.edits[0].mask.boxes.boxes[0]", "left < right"),
        (a_request(an_edit(mask=boxes((0, 0, NAN, 1)))), "run.edits[0].mask.boxes.boxes[0]", "left < right"),
        (a_request(an_edit(mask=boxes((0, 0, 1.1, 1)))), "run.edits[0].mask.boxes.boxes[0]", "<= 1"),
        (a_request(an_edit(mask=boxes(*[(0, 0, 1, 1)] * 257))), "run.edits[0].mask.boxes.boxes", "256"),
        (a_request(an_edit(mask=polygon((0, 0), (1, 1)))), "run.edits[0].mask.polygons.polygons[0].points", "three"),
        (
            a_request(an_edit(mask=polygon((0, 0), (1, 1), (0.5, 0.5)))),
            "run.edits[0].mask.polygons.polygons[0].points",
            "no area",
        ),
        (
            a_request(an_edit(mask=polygon((0, 0), (1, 1), (0.5, -0.5)))),
            "run.edits[0].mask.polygons.polygons[0].points",
            "0 to 1",
        ),
        (a_request(an_edit(mask=polygon(*SQUARE * 1400))), "run.edits[0].mask.polygons.polygons", "4096"),
        (a_request(an_edit(mask={"png": b"GIF89a"})), "run.edits[0].mask.png", "readable"),
        (a_request(an_edit(mask={"png": png(np.ones((9, 9)))["png"][:-30]})), "run.edits[0].mask.png", "readable"),
        (a_request(an_edit(mask={"png": bytes(2**22 + 1)})), "run.edits[0].mask.png", "4194304"),
        (a_request(an_edit(mask=png(np.zeros((9, 9))))), "run.edits[0].mask.png", "black"),
        (a_request(an_edit(replace={}), an_edit(2, replace={})), "run.edits[1].mask", "run.edits[0]"),
        (a_request(*[{**an_edit(), "features": MANY}] * 5), "run.edits", "got '5120 features'; the edits"),
        (a_request(references={f"r{i}": A_RUN for i in range(5)}), "run.references", "at most 4"),
        (a_request(references={"a b": A_RUN}), "run.references['a b']", "letters"),
        (a_request(references={"r": A_RUN}), "run.references['r']", "read by no edit"),
        (a_request(references={"r": {}}), "run.references['r'].source", "missing"),
        (a_request(references={"r": {**A_RUN, "seed": -1}}), "run.references['r'].seed", "2^63 - 1"),
        (a_request({"patch": {}}), "run.edits[0].patch.hook_points", "at least one"),
        (a_request({"patch": {}, "reference": "s"}, references={"r": A_RUN}), "run.edits[0].reference", "are: r"),
        (a_request({"patch": {"hook_points": ["mid.0", "x"]}}), "run.edits[0].patch.hook_points[1]", "mid.0, up.0.1"),
        (a_request({"patch": {"hook_points": ["mid.0"] * 2}}), "run.edits[0].patch.hook_points[1]", "once"),
        (a_request({**an_edit(), "patch": {}}), "run.edits[0].features", "no features"),
        (a_request(an_edit(transfer={"multiplier": NAN})), "run.edits[0].transfer.multiplier", "finite"),
        (a_request(an_edit(transfer={})), "run.edits[0].reference", "are: none"),
        (a_request({"transfer": {}}), "run.edits[0].features", "1 to 1024"),
        (a_request(an_edit(reference="r"), references={"r": A_RUN}), "run.edits[0].reference", "add reads none"),
        (a_request(an_edit(add={"unit": steering.UNIT_REFERENCE})), "run.edits[0].reference", "are: none"),
        (a_request(an_edit(replace={"unit": steering.UNIT_REFERENCE})), "run.edits[0].replace.unit", "other units"),
        (
            a_request(an_edit(transfer={"remove": [{"sae": "mid.0", "index": 16}]})),
            "run.edits[0].transfer.remove[0].index",
            "0 to 15",
        ),
        (
            a_request(an_edit(transfer={"remove": [{"sae": "mid.0", "index": 1}]})),
            "run.edits[0].transfer.remove[0]",
            "once",
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(request_, field, says):
    found = violations(request_)
    assert says in found.get(field, ""), found


FREE = an_info(scheduler="LCMScheduler", takes_timesteps=True, timesteps=(799, 399))


@pytest.mark.parametrize(
    ("sampling", "steps", "timesteps"),
    [
        ({"timesteps": [399]}, 1, (399,)),
        ({"steps": 2, "timesteps": [999, 0]}, 2, (999, 0)),
        ({"steps": 2}, 2, (799, 399)),
        ({"steps": 3}, 3, ()),
    ],
)
def test_timesteps_are_the_requests_or_the_operators_and_are_told(sampling, steps, timesteps):
    valid = validate_generate(a_request(sampling=sampling), FREE, LIMITS)
    assert [(job.steps, job.timesteps) for job in valid.jobs] == [(steps, timesteps)]
    assert (valid.run.sampling.steps, tuple(valid.run.sampling.timesteps)) == (steps, timesteps)


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"timesteps": [399, 399]}, "must fall, within 999 to 0"),
        ({"timesteps": [1000]}, "must fall, within 999 to 0"),
        ({"timesteps": [-1]}, "must fall, within 999 to 0"),
        ({"timesteps": [9, 8, 7, 6, 5]}, "at most 4"),
        ({"steps": 2, "timesteps": [399]}, "as many as sampling.steps, which is 2"),
    ],
)
def test_timesteps_that_no_walk_visits_are_refused(sampling, says):
    assert says in violations(a_request(sampling=sampling), FREE)["run.sampling.timesteps"]


def test_what_the_scheduler_cannot_do_is_refused():
    info = an_info(scheduler="UniPCMultistepScheduler", previews=False)
    assert "UniPCMultistepScheduler chooses its own" in violations(
        a_request(sampling={"timesteps": [399]}), info
    )["run.sampling.timesteps"]  # fmt: skip
    stream = messages.stream_generate(prompt="x", previews=True)
    assert "no estimate" in violations(stream, info)["previews"]


def test_all_that_is_wrong_is_told_at_once():
    bad = an_edit(99, sae="mid.0", add={"strength": NAN, "unit": 8}, steps={"start": 3, "end": 9}, mask={})
    found = violations(a_request(bad, seeds=[-1], sampling={"steps": 9}, image={"format": 7}, request_id="\x00"))
    prefix = "run.edits[0]."
    assert found.keys() >= {
        "request_id", "run.seeds[0]", "run.sampling.steps", "image.format", f"{prefix}add.strength",
        f"{prefix}add.unit", f"{prefix}features[0].feature.index", f"{prefix}steps", f"{prefix}mask.shape",
    }  # fmt: skip


def test_the_size_of_an_answer_is_counted_before_any_work():
    """By k where there is one, by what was measured where not, and not at all where nobody knows."""
    grid = (1024, 1024)  # 64 x 64 positions
    info = dataclasses.replace(NESTED, sizes=(grid,), default_size=grid)

    def size(saes, **changes) -> int:
        features = {"saes": saes, **changes}
        request = messages.extract(prompt="x", seeds=[7], features=features)
        valid = validate_extract(request, info, LIMITS)
        return features_bytes(valid.jobs[0], valid.selection, info)

    positions = 64 * 64
    assert size(["mid.0"]) == positions * (2 + 2 * 4)  # counts, and k entries of index and float16
    assert size(["mid.0"], value_type=run.VALUE_TYPE_FLOAT32) == positions * (2 + 2 * 6)
    assert size(["jump"]) == positions * 2
    frequency = INFO.saes["mid.0"].bundle.stats.frequency
    only = [{"sae": "mid.0", "index": 15}]
    assert size(["mid.0"], only=only) == int(positions * (2 + 4 * float(frequency[15])))


def test_a_long_value_is_shown_short():
    assert len(violations(a_request(prompt="y" * 10**6))["run.source.prompt.text"]) < 200


def test_a_raw_strength_may_be_as_large_as_the_saes_activations_ask_for():
    """An SAE whose features are active at 3,000 is steered with 9,000; in other units that is a slip."""
    loud = dataclasses.replace(_PLAIN.bundle, stats=dataclasses.replace(INFO.saes["mid.0"].bundle.stats, mean=MEANS))
    info = an_info(saes={"up.0.1": dataclasses.replace(_PLAIN, bundle=loud)})
    for kind in ({"add": {"strength": -9e3, "unit": UNIT_RAW}}, {"set": {"value": 3e6, "unit": UNIT_RAW}}):
        validate_generate(a_request(an_edit(sae="up.0.1", **kind)), info, LIMITS)
    for kind in ({"add": {"strength": 9e3}}, {"add": {"strength": 9e3, "unit": UNIT_NORM}}):
        assert (
            "-1000 to 1000" in violations(a_request(an_edit(sae="up.0.1", **kind)), info)["run.edits[0].add.strength"]
        )
    beyond = violations(a_request(an_edit(sae="up.0.1", set={"value": 3.1e6, "unit": UNIT_RAW})), info)
    assert "3e+06" in beyond["run.edits[0].set.value"]


@given(
    st.sampled_from([name for name, kind in KINDS.items() if kind.amount and not kind.reference]),
    st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_an_amount_for_each_step_is_an_edit_for_each_step(kind, amounts, start):
    amounts = amounts[: 4 - start]
    window = {"start": start, "end": start + len(amounts)}
    each = [
        an_edit(**{kind: {KINDS[kind].amount: amount}}, steps={"start": start + i, "end": start + i + 1})
        for i, amount in enumerate(amounts)
    ]
    sampling = {"steps": 4}
    one = validate_generate(
        a_request(an_edit(**{kind: {}}, steps=window, amounts=amounts), sampling=sampling), INFO, LIMITS
    )
    several = validate_generate(a_request(*each, sampling=sampling), INFO, LIMITS)
    assert one.jobs == several.jobs
    if len(amounts) == 4:
        whole = validate_generate(a_request(an_edit(**{kind: {}}, amounts=amounts), sampling=sampling), INFO, LIMITS)
        assert whole.jobs == one.jobs


def test_what_is_right_becomes_jobs():
    edits = [
        {
            "features": [{"feature": {"sae": "mid.0", "index": 1}, "weight": 0.5}, {"feature": {"sae": "mid.0"}}],
            "add": {"strength": -40},
            "steps": {"start": 1, "end": 2},
        },
        an_edit(DEAD, scale={"factor": 0}),
        an_edit(sae="up.0.1", set={"value": 3, "unit": UNIT_RAW}, mask=boxes((0, 0, 0.5, 1))),
    ]
    request = messages.stream_generate(
        edits=edits, seeds=[3, 2**63 - 1], sampling={"steps": 2, "height": 32}, prompt="", previews=True
    )
    valid = validate_generate(request, INFO, LIMITS)
    assert [(j.prompt, j.seed, j.steps, j.height, j.width, j.previews) for j in valid.jobs] == [
        ("", 3, 2, 32, 64, True), ("", 2**63 - 1, 2, 32, 64, True),
    ]  # fmt: skip
    first, second, third = valid.jobs[0].edits
    weighted = (WeightedFeature("mid.0", 1, 0.5), WeightedFeature("mid.0", 0, 1.0))
    assert first == Edit("add", weighted, -40, Unit.MEAN, None, (1, 2))
    assert (second.kind, second.amount) == ("scale", 0)
    assert (third.unit, third.mask.on_grid(2, 4).tolist()) == (Unit.RAW, [[1, 1, 0, 0]] * 2)
    assert valid.selection is None
    assert valid.jobs[0].saes == ()


def test_features_wanted_are_all_unless_named_and_in_order_of_blocks():
    whole = validate_extract(messages.extract(prompt=""), INFO, LIMITS)
    assert (whole.jobs[0].saes, whole.jobs[0].picture) == (("mid.0", "up.0.1"), False)
    named = a_request(features={"saes": ["up.0.1", "mid.0", "up.0.1"]})
    assert validate_generate(named, INFO, LIMITS).jobs[0].saes == ("mid.0", "up.0.1")


def temporal_info(steps: int = 3):
    """One SAE that reads runs of some steps, and one that reads any step."""
    sae = INFO.saes["mid.0"]
    weights = dataclasses.replace(sae.bundle.weights, scales=torch.ones(steps))
    temporal = dataclasses.replace(sae, bundle=dataclasses.replace(sae.bundle, weights=weights))
    return dataclasses.replace(INFO, saes={**INFO.saes, "mid.0": temporal})


def test_a_temporal_sae_is_asked_for_its_own_steps_and_open_edits_alone():
    request = a_request(
        an_edit(scale={"factor": 2}), an_edit(set={"value": 1}), an_edit(), features={"saes": ["mid.0"]}
    )
    with pytest.raises(RpcError) as caught:
        validate_generate(request, temporal_info(), LIMITS)
    why = "of the temporal SAE mid.0 are known after the last step"
    assert [(v.field, v.description.split(";")[0]) for v in caught.value.violations] == [
        ("run.edits[0].scale", f"scale needs activations while the picture is made, and those {why}"),
        ("run.edits[1].set", f"set needs activations while the picture is made, and those {why}"),
        ("run.sampling.steps", "got 1"),
    ]
    assert caught.value.violations[2].description.endswith("the temporal SAE mid.0 serves runs of 3 steps alone")
    allowed = a_request(an_edit(), an_edit(replace={"strength": 1}), features={}, sampling={"steps": 3})
    assert validate_generate(allowed, temporal_info(), LIMITS).jobs[0].saes == ("mid.0", "up.0.1")


def test_a_temporal_sae_reads_whole_runs_and_not_the_last_steps_of_one():
    """Three of six steps from a picture are as many as it reads, and others: what changed before them is not there."""
    noise = run.Tensor(shape=[4, 8, 8], type=run.VALUE_TYPE_FLOAT32, data=np.zeros((4, 8, 8), "<f4").tobytes())

    def request(strength, steps, **features):
        source = {"latents": {"latents": noise, **({} if strength is None else {"strength": strength})}}
        return messages.generate(source=source, seeds=[1], sampling={"steps": steps}, features=features)

    info = dataclasses.replace(temporal_info(), max_steps=6)
    with pytest.raises(RpcError) as caught:
        validate_generate(request(0.5, 6, saes=["mid.0"]), info, LIMITS)
    (violation,) = caught.value.violations
    assert violation.field == "run.sampling.steps"
    assert "serves runs of 3 steps alone, from the first on" in violation.description
    assert validate_generate(request(0.5, 6), info, LIMITS).jobs[0].saes == ("up.0.1",)  # who names none
    for whole in (None, 1.0):
        assert validate_generate(request(whole, 3), info, LIMITS).jobs[0].saes == ("mid.0", "up.0.1")


def test_who_names_no_sae_gets_those_that_the_steps_allow():
    assert validate_generate(a_request(features={}), temporal_info(), LIMITS).jobs[0].saes == ("up.0.1",)
    alone = dataclasses.replace(temporal_info(), saes={"mid.0": temporal_info().saes["mid.0"]})
    with pytest.raises(RpcError) as caught:
        validate_extract(messages.extract(prompt=""), alone, LIMITS)
    assert "runs of 3 steps alone" in caught.value.violations[0].description


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ({"sae": "mid.0", "k": 5}, "k", "got 5; mid.0 allows 1 to 4"),
        ({"sae": "mid.0", "k": 0}, "k", "1 to 4"),
        ({"sae": "mid.0", "k": -1}, "k", "1 to 4"),
        ({"sae": "mid.0", "prefix": 6}, "prefix", "got 6; mid.0 allows 4, 8, 16"),
        ({"sae": "mid.0", "prefix": 0}, "prefix", "4, 8, 16"),
        ({"sae": "up.0.1", "k": 3}, "k", "got 3; up.0.1 allows only 2"),
        ({"sae": "up.0.1", "prefix": 8}, "prefix", "only 16"),
        ({"sae": "jump", "k": 3}, "k", "jump has no k"),
        ({"sae": "down.9", "k": 3}, "sae", "this server has mid.0, up.0.1, jump"),
    ],
)
def test_how_an_sae_is_read_is_checked_before_any_work(options, field, says):
    found = violations(a_request(features={}, sae_options=[options]), NESTED)
    assert found.keys() == {f"run.sae_options[0].{field}"}
    assert says in found[f"run.sae_options[0].{field}"]


def test_an_sae_is_read_in_one_way_and_only_where_the_request_uses_it():
    twice = [{"sae": "mid.0", "k": 1}, {"sae": "mid.0", "k": 2}]
    assert "once" in violations(a_request(features={}, sae_options=twice), NESTED)["run.sae_options[1].sae"]
    for more in ({}, {"features": {"saes": ["up.0.1"]}}):
        found = violations(a_request(sae_options=twice[:1], **more), NESTED)
        assert "asked for or edited" in found["run.sae_options[0].sae"]
    for used in (a_request(an_edit(), sae_options=twice[:1]), a_request(features={}, sae_options=twice[:1])):
        assert validate_generate(used, NESTED, LIMITS).jobs[0].sae_options == (SaeOptions("mid.0", 1),)


def test_past_a_prefix_there_is_no_feature():
    options = [{"sae": "mid.0", "prefix": 8}]
    found = violations(
        a_request(an_edit(7), an_edit(8), features={"only": [{"sae": "mid.0", "index": 9}]}, sae_options=options),
        NESTED,
    )
    assert found.keys() == {"run.edits[1].features[0].feature.index", "run.features.only[0].index"}
    assert "must be 0 to 7 for mid.0 at prefix 8" in found["run.features.only[0].index"]


def test_how_saes_are_read_reaches_every_job():
    options = [{"sae": "up.0.1", "k": 2, "prefix": 16}, {"sae": "mid.0", "prefix": 4}]
    request = messages.extract(prompt="", seeds=[1, 2], sae_options=options)
    valid = validate_extract(request, NESTED, LIMITS)
    expected = (SaeOptions("up.0.1", 2, 16), SaeOptions("mid.0", None, 4))
    assert [job.sae_options for job in valid.jobs] == [expected] * 2


def test_replacements_side_by_side_or_at_other_times_are_allowed():
    left, right = boxes((0, 0, 0.5, 1)), boxes((0.5, 0, 1, 1))
    validate_generate(a_request(an_edit(replace={}, mask=left), an_edit(replace={}, mask=right)), INFO, LIMITS)
    earlier, later = {"start": 0, "end": 1}, {"start": 1, "end": 2}
    edits = an_edit(replace={}, steps=earlier), an_edit(replace={}, steps=later)
    validate_generate(a_request(*edits, sampling={"steps": 2}), INFO, LIMITS)


def grey(*levels):
    """A mask PNG of one row of 8-bit pixels."""
    return png(np.array([levels]))


def test_replacements_may_share_a_place_up_to_the_whole_of_it():
    half = an_edit(replace={}, mask=grey(128))  # 0.502: twice that is more than 1 by no more than a grey level
    third = an_edit(replace={}, mask=grey(102))  # 0.4
    validate_generate(a_request(half, half), INFO, LIMITS)
    validate_generate(a_request(third, third), INFO, LIMITS)
    assert "as run.edits[0], run.edits[1]" in violations(a_request(third, third, third))["run.edits[2].mask"]
    assert "as run.edits[0]" in violations(a_request(half, an_edit(replace={}, mask=grey(150))))["run.edits[1].mask"]


def test_edits_of_two_saes_at_one_block_may_not_replace_the_same_place():
    other = an_edit(replace={})
    other["features"][0]["feature"]["sae"] = "mid.0-b"
    served = dataclasses.replace(INFO, saes={**INFO.saes, "mid.0-b": INFO.saes["mid.0"]})
    assert (
        "the same place of mid.0 as run.edits[0]"
        in violations(a_request(an_edit(replace={}), other), served)["run.edits[1].mask"]
    )
    both = an_edit(replace={})
    both["features"] += other["features"]
    validate_generate(a_request(both), served, LIMITS)


def test_masks_become_what_the_engine_needs_of_them_once():
    request = a_request(an_edit(mask=grey(0, 255)), an_edit(), seeds=[1, 2])
    first, second = validate_generate(request, INFO, LIMITS).jobs
    assert first.edits[0].mask is second.edits[0].mask
    (grid,) = first.edits[0].mask.grids.values()
    assert grid.mean() == 0.5
    assert first.edits[1].mask is None


def test_masks_cannot_cost_much_more_than_they_weigh():
    white = png(np.full((4000, 4000), 255))
    assert len(white["png"]) < 100_000
    refused = a_request(*[an_edit(mask=white)] * 3)
    assert violations(refused).keys() == {"run.edits[1].mask.png"}
    unpacking_s = fastest_s(lambda: Image.open(io.BytesIO(white["png"])).load())
    assert fastest_s(lambda: violations(refused)) < unpacking_s  # none was unpacked
    many = boxes(*((i / 512, i / 512, i / 512 + 0.3, i / 512 + 0.3) for i in range(256)))
    asked = a_request(an_edit(mask=many))
    assert fastest_s(lambda: validate_generate(asked, INFO, LIMITS)) < 10 * unpacking_s


any_float = st.one_of(st.floats(width=32), st.sampled_from([0.0, 0.5, 1.0]))
any_int = st.one_of(st.integers(-2, 20), st.integers(-(2**31), 2**31 - 1))
masks = st.one_of(
    st.just({}),
    st.builds(lambda b: {"png": b}, st.binary(max_size=40)),
    st.builds(png, st.lists(st.lists(st.integers(0, 255), min_size=2, max_size=2), min_size=1)),
    st.builds(lambda e: boxes(*e), st.lists(st.tuples(*[any_float] * 4), max_size=3)),
    st.builds(lambda p: polygon(*p), st.lists(st.tuples(any_float, any_float), max_size=5)),
)
refs = st.builds(
    lambda sae, index: {"sae": sae, "index": index}, st.sampled_from(["mid.0", "up.0.1", "", "é" * 99]), any_int
)
terms = st.fixed_dictionaries({"feature": refs}, optional={"weight": any_float})
kinds = st.one_of(
    st.just({}),
    st.builds(lambda n, s, u: {n: {"strength": s, "unit": u}}, st.sampled_from(["add", "replace"]), any_float, any_int),
    st.builds(lambda v, u: {"set": {"value": v, "unit": u}}, any_float, any_int),
    st.builds(lambda f: {"scale": {"factor": f}}, any_float),
    st.builds(
        lambda r, p: {"patch": {"hook_points": p}, "reference": r},
        st.sampled_from(["r", "?"]),
        st.lists(st.sampled_from(["mid.0", "up.0.1", "?"]), max_size=3),
    ),
    st.builds(
        lambda r, m, f: {"transfer": {"multiplier": m, "remove": f}, "reference": r},
        st.sampled_from(["r", "?"]), any_float, st.lists(refs, max_size=3),
    ),
)  # fmt: skip
windows = st.builds(lambda a, b: {"start": a, "end": b}, any_int, any_int)
edits = st.builds(
    lambda kind, more: {**kind, **more},
    kinds,
    st.fixed_dictionaries({"features": st.lists(terms, max_size=3)}, optional={"mask": masks, "steps": windows}),
)
sampling = st.fixed_dictionaries(
    {},
    optional={
        "steps": any_int,
        "width": any_int,
        "height": any_int,
        "guidance_scale": any_float,
        "guidance_rescale": any_float,
        "negative_prompt": st.text(max_size=5),
    },
)
shared = {
    "prompt": st.text(max_size=30),
    "request_id": st.text(max_size=140),
    "sampling": sampling,
    "seeds": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=18),
    "edits": st.lists(edits, max_size=3),
    "references": st.dictionaries(
        st.one_of(st.just("r"), st.text(max_size=3)),
        st.fixed_dictionaries({}, optional={"source": st.sampled_from([{}, A_RUN["source"]]), "seed": any_int}),
        max_size=3,
    ),
    "gate": st.booleans(),
    "regions": st.lists(
        st.fixed_dictionaries({}, optional={"mask": masks, "prompt": st.text(max_size=5)}), max_size=10
    ),
    "features": st.fixed_dictionaries(
        {},
        optional={
            "labels": st.booleans(),
            "saes": st.lists(st.sampled_from(["mid.0", "up.0.1", "?"]), max_size=3),
            "only": st.lists(refs, max_size=3),
            "value_type": any_int,
        },
    ),
    "sae_options": st.lists(
        st.fixed_dictionaries(
            {"sae": st.sampled_from(["mid.0", "up.0.1", "jump", "?"])}, optional={"k": any_int, "prefix": any_int}
        ),
        max_size=3,
    ),
}
image = st.fixed_dictionaries({}, optional={"format": any_int, "quality": any_int})


def check(message, validate) -> None:
    """Valid, or refused with fields that name something; never another exception."""
    try:
        valid = validate(message, NESTED, LIMITS)
    except RpcError as error:
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations
        assert all(v.field and v.description for v in error.violations)
        pairs = error.trailing_metadata("id")
        assert sum(len(key) + len(value) * 4 / 3 for key, value in pairs) < 8000
        return
    for job in valid.jobs:
        assert (job.height, job.width) in INFO.sizes
        assert all(np.isfinite(edit.amount) and (edit.features or edit.points) for edit in job.edits)


@given(st.fixed_dictionaries({}, optional={**shared, "image": image}))
def test_any_request_for_pictures_is_valid_or_refused_by_field(fields):
    check(messages.generate(**fields), validate_generate)


@given(st.fixed_dictionaries({}, optional=shared))
def test_any_request_for_features_is_valid_or_refused_by_field(fields):
    check(messages.extract(**fields), validate_extract)


@given(st.binary(max_size=200))
def test_any_bytes_that_parse_are_valid_or_refused_by_field(data):
    from google.protobuf.message import DecodeError

    try:
        message = gs.GenerateRequest.FromString(data)
    except DecodeError:
        return
    check(message, validate_generate)


def test_raw_pictures_and_lossy_quality_are_kept():
    valid = validate_generate(a_request(image={"format": run.IMAGE_FORMAT_WEBP, "quality": 1}), INFO, LIMITS)
    assert (valid.image_format, valid.image_quality) == (run.IMAGE_FORMAT_WEBP, 1)


def test_what_reads_another_run_becomes_plain_values():
    patch = {"patch": {"hook_points": ["mid.0", "up.0.1"]}, "reference": "r", "mask": boxes((0, 0, 0.5, 1))}
    moved = an_edit(DEAD, transfer={"remove": [{"sae": "up.0.1", "index": 2}]}, reference="s", steps={"end": 1})
    moved["features"][0]["weight"] = 0.5
    added = an_edit(DEAD, add={"strength": 2, "unit": steering.UNIT_REFERENCE}, reference="s")
    references = {"s": {**A_RUN, "seed": 3}, "r": A_RUN}
    jobs = validate_generate(a_request(patch, moved, added, references=references, seeds=[7, 8]), INFO, LIMITS).jobs
    assert [job.references for job in jobs] == [
        (Reference("r", "y", 7), Reference("s", "y", 3)), (Reference("r", "y", 8), Reference("s", "y", 3)),
    ]  # fmt: skip
    first, second, third, fourth = jobs[0].edits
    assert (first.kind, first.features, first.reference, first.points) == ("patch", (), "r", ("mid.0", "up.0.1"))
    assert first.mask.on_grid(4, 4).mean() == 0.5
    term = WeightedFeature("mid.0", DEAD, 0.5)
    assert second == Edit("transfer", (term,), steps=(0, 1), reference="s")
    assert third == Edit("scale", (WeightedFeature("up.0.1", 2),), 0.0, steps=(0, 1))
    assert fourth == Edit("add", (WeightedFeature("mid.0", DEAD),), 2.0, Unit.REFERENCE, reference="s")


def test_a_patch_and_a_replacement_may_not_share_a_place():
    patch = {"patch": {"hook_points": ["mid.0"]}, "reference": "r"}
    found = violations(a_request(an_edit(replace={}), patch, references={"r": A_RUN}))
    assert "the same place of mid.0 as run.edits[0]" in found["run.edits[1].mask"]


def test_what_a_transfer_takes_away_does_not_shift_the_numbers_of_later_edits():
    moved = an_edit(transfer={"remove": [{"sae": "mid.0", "index": 2}]}, reference="r")
    found = violations(a_request(moved, an_edit(replace={}), an_edit(replace={}), references={"r": A_RUN}))
    assert "as run.edits[1]" in found["run.edits[2].mask"]


def test_regions_come_with_their_masks_on_the_grids_of_the_run():
    sized = {"sampling": {"height": 32, "width": 64}}
    request = a_request(regions=[a_region(), a_region(mask=png([[0, 255], [255, 0]]), prompt="y")], **sized)
    valid = validate_generate(request, INFO, LIMITS)
    left, checked = valid.jobs[0].regions
    assert [left.prompt, checked.prompt] == ["a red ring", "y"]
    assert left.mask.on_grid(2, 4).tolist() == [[1, 1, 0, 0]] * 2
    assert checked.mask.on_grid(2, 4).tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert valid.run.regions == request.run.regions


@pytest.mark.parametrize(("backend", "other"), [("tensorrt", ""), ("onnx", " or --onnx-regions --dtype float32")])
def test_a_backend_that_serves_no_regions_refuses_them_by_name(backend, other):
    with pytest.raises(RpcError) as caught:
        validate_generate(a_request(regions=[a_region()]), an_info(region_strides=(), backend=backend), LIMITS)
    (violation,) = caught.value.violations
    assert (violation.field, violation.description) == (
        "run.regions", f"the backend {backend} serves none; serve with --backend torch{other}"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("opens", "told"),
    [
        (True, "no learned region gates are served; serve with --gate PATH"),
        (False, "the backend onnx takes no learned region gates; serve with --backend torch"),
    ],
)
def test_gates_that_are_not_served_are_refused_by_name(opens, told):
    with pytest.raises(RpcError) as caught:
        validate_generate(a_request(gate=True), an_info(opens_attention=opens, backend="onnx"), LIMITS)
    (violation,) = caught.value.violations
    assert (violation.field, violation.description) == ("run.gate", told)
    assert not validate_generate(a_request(gate=False), INFO, LIMITS).jobs[0].gate


def an_attribution(**fields) -> fs.AttributeFeatureRequest:
    feature = {"sae": Z, "index": 1} | fields.pop("feature", {})
    return fs.AttributeFeatureRequest(run=messages.extract(**{"prompt": "x", **fields}).run, feature=feature)


def an_info_with_z(**changes):
    """With an SAE at the z of a layer, read by a temporal one too where `steps` are given."""
    steps = changes.pop("steps", 0)
    bundle = dataclasses.replace(a_bundle("up.0.1", stats=True), name=Z, hook_point=Z)
    if steps:
        weights = dataclasses.replace(bundle.weights, W_enc=torch.zeros(8, D_SAE), scales=torch.ones(steps))
        bundle = dataclasses.replace(bundle, weights=weights)
    points = (*INFO.hook_points, HookPoint(Z, "module", 4, 16))
    saes = {**INFO.saes, Z: SaeInfo(Z, Z, bundle, forced=False)}
    return an_info(hook_points=points, saes=saes, **changes)


Z = "up.0.1.attn2.0.z"


@pytest.mark.parametrize(
    ("info", "fields", "field", "told"),
    [
        ({"opens_attention": False, "backend": "onnx"}, {}, "feature",
         "the backend onnx does not show attention; serve with --backend torch"),
        ({"steps": 2}, {"sampling": {"steps": 2}}, "feature.sae", "its features are of whole runs"),
        ({}, {"feature": {"sae": "mid.0"}}, "feature.sae", f"this server has {Z}"),
        ({}, {"gate": True}, "run.gate", "no learned region gates are served"),
        ({}, {"seeds": [1, 2]}, "run.seeds", "one run is attributed at a time"),
    ],
)  # fmt: skip
def test_what_cannot_be_attributed_is_refused_by_name(info, fields, field, told):
    with pytest.raises(RpcError) as caught:
        validate_attribute(an_attribution(**fields), an_info_with_z(**info), LIMITS)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert told in violation.description
    assert validate_attribute(an_attribution(), an_info_with_z(), LIMITS).jobs[0].attribute is not None


def test_gates_are_those_of_the_job():
    request = a_request(gate=True)
    valid = validate_generate(request, an_info(gate=a_gate()), LIMITS)
    assert valid.jobs[0].gate
    assert valid.run.gate
