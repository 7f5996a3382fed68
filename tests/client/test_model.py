"""What a server says of itself becomes plain values."""

from __future__ import annotations

import dataclasses

import pytest

import turbolens as tl
from turbolens import _model
from turbolens_proto.v1 import model_service_pb2 as ms
from turbolens_proto.v1 import run_pb2 as run

MESSAGES = {
    _model.Model: ms.Model, _model.Sae: ms.Sae, _model.HookPoint: ms.HookPoint, _model.Limits: ms.Limits,
    _model.Memory: ms.Memory, _model.Scheduler: ms.Scheduler, _model.Size: ms.Size, _model.Defaults: run.Sampling,
    _model.Lora: run.Lora,
}  # fmt: skip


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_field_of_the_contract_is_there_by_its_name(kind):
    told = {field.name for field in MESSAGES[kind].DESCRIPTOR.fields}
    assert {field.name for field in dataclasses.fields(kind)} - {"message"} == told


def test_a_message_becomes_values():
    message = ms.Model(
        name="m", hook_points=[ms.HookPoint(name="mid.0", d_model=4)], versions={"torch": "2"},
        saes=[ms.Sae(name="mid.0", units=[1, 2], prefixes=[4, 8], provenance_json='{"recipe": "r"}')],
        limits=ms.Limits(max_steps=4, sizes=[ms.Size(width=8, height=16)]), edit_kinds=["add"],
    )  # fmt: skip
    model = tl.Model.from_proto(message)
    assert model.hook_points == (tl.HookPoint("mid.0", "", 4, 0, 0),)
    assert model.saes[0].units == ("raw", "mean")
    assert model.saes[0].prefixes == (4, 8)
    assert model.saes[0].provenance == {"recipe": "r"}
    assert model.limits.sizes == (_model.Size(8, 16),)
    assert model.versions == {"torch": "2"}
    assert model.memory.available_bytes is None
    message.memory.available_bytes = 0
    assert tl.Model.from_proto(message).memory.available_bytes == 0
    assert "mid.0" in model._repr_html_()
    assert repr(model) == "Model('m',  on , , saes=['mid.0'])"
