"""Lists and texts of any length cost no more than counting them, and what is said of them is short."""

from __future__ import annotations

import pytest
from fake_engine import an_info
from google.protobuf.descriptor import FieldDescriptor

from tests.pace import fastest_s
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import run_pb2
from turbolens_server.rpc.errors import RpcError
from turbolens_server.rpc.validation import RequestLimits, validate_generate

INFO, LIMITS = an_info(), RequestLimits()
MANY = 500_000
"""Of parts without contents: a megabyte on the wire."""


def number(value: int) -> bytes:
    """A varint."""
    return bytes([value & 127 | 128]) + number(value >> 7) if value > 127 else bytes([value])


def part(field: FieldDescriptor, content: bytes) -> bytes:
    """A field of bytes, of text, of packed numbers or of a message."""
    return number(field.number << 3 | 2) + number(len(content)) + content


def a_run_with(path: str, many: int) -> run_pb2.Run:
    """A run whose list at a path has so many items, made as bytes: as quickly as a caller could."""
    names, message, fields = path.split("."), run_pb2.Run.DESCRIPTOR, []
    for name in names:
        fields.append(message.fields_by_name[name])
        message = fields[-1].message_type
    last = fields.pop()
    if last.message_type is not None and last.message_type.GetOptions().map_entry:
        key = last.message_type.fields_by_name["key"]
        content = b"".join(part(last, part(key, str(i).encode())) for i in range(many // 10))
    elif last.cpp_type in (FieldDescriptor.CPPTYPE_MESSAGE, FieldDescriptor.CPPTYPE_STRING):
        content = part(last, b"") * many
    else:
        content = part(last, bytes(4 if last.cpp_type == FieldDescriptor.CPPTYPE_FLOAT else 1) * many)
    for field in reversed(fields):
        content = part(field, content)
    run = run_pb2.Run(source=run_pb2.Source(prompt=run_pb2.PromptSource(text="x")))
    if "latents" in names:
        run.ClearField("source")
    run.MergeFromString(content)
    if run.edits and run.edits[0].WhichOneof("kind") is None:
        run.edits[0].add.SetInParent()
    return run


def refusal(request: gs.GenerateRequest) -> RpcError:
    with pytest.raises(RpcError) as caught:
        validate_generate(request, INFO, LIMITS)
    return caught.value


def refused(run: run_pb2.Run) -> RpcError:
    """The refusal, which took about as long as it takes to count to so many."""
    request = gs.GenerateRequest(run=run)
    error = refusal(request)
    counting_s = fastest_s(lambda: [None for _ in range(MANY)])
    assert fastest_s(lambda: refusal(request)) < 5 * counting_s  # twice at most, when this was written
    assert sum(len(one.field) + len(one.description) for one in error.violations) < 100_000
    return error


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("seeds", "run.seeds"), ("more_prompts", "run.more_prompts"), ("regions", "run.regions"),
        ("references", "run.references"), ("sampling.timesteps", "run.sampling.timesteps"),
        ("sae_options", "run.sae_options"), ("features.saes", "run.features.saes"),
        ("features.only", "run.features.only"), ("edits", "run.edits"), ("edits.features", "run.edits"),
        ("edits.transfer.remove", "run.edits"), ("edits.amounts", "run.edits[0].amounts"),
        ("edits.transfer.choice.saes", "run.edits[0].transfer.choice.saes"),
        ("edits.patch.hook_points", "run.edits[0].patch.hook_points"),
        ("edits.mask.boxes.boxes", "run.edits[0].mask.boxes.boxes"),
        ("edits.mask.polygons.polygons", "run.edits[0].mask.polygons.polygons"),
        ("edits.mask.polygons.polygons.points", "run.edits[0].mask.polygons.polygons"),
        ("edits.transfer.choice.own_mask.boxes.boxes", "run.edits[0].transfer.choice.own_mask.boxes.boxes"),
        ("regions.mask.boxes.boxes", "run.regions[0].mask.boxes.boxes"),
        ("source.latents.latents.shape", "run.source.latents.latents.shape"),
    ],
)  # fmt: skip
def test_lists_are_counted_before_they_are_looked_at(path, field):
    error = refused(a_run_with(path, MANY))
    told = {one.field: one.description for one in error.violations}
    assert field in told
    assert any(one in told[field] for one in ("at most", "may ", "must be one of", "give one for each", "takes none"))


def test_every_list_of_a_run_has_its_bound_or_is_few_by_another():
    """Whoever adds one to the contract is asked here how long it may be."""
    bounded = {case[0] for case in test_lists_are_counted_before_they_are_looked_at.pytestmark[0].args[1]}
    found = set()

    def walk(message, above: str, seen: frozenset[str]) -> None:
        for field in message.fields:
            path = f"{above}{field.name}"
            if field.is_repeated:
                found.add(path)
            if field.message_type is not None and field.message_type.full_name not in seen:
                walk(field.message_type, f"{path}.", seen | {field.message_type.full_name})

    walk(run_pb2.Run.DESCRIPTOR, "", frozenset())
    of_masks = {name for name in found if "mask." in name}  # of a request, whatever they are of
    of_sources = {name for name in found if name.endswith("latents.shape")}
    assert found - of_masks - of_sources == bounded - of_masks - of_sources
    assert {name.rpartition("mask.")[2] for name in of_masks} == {
        name.rpartition("mask.")[2] for name in bounded & of_masks
    }
    assert bounded & of_sources


def test_what_is_said_of_long_names_is_short():
    long = "x" * 2**20
    run = run_pb2.Run(source=run_pb2.Source(prompt=run_pb2.PromptSource(text=long)))
    for i in range(4):
        run.references[long + str(i)].source.prompt.text = ""
    for _ in range(64):
        run.edits.add(reference=long).transfer.SetInParent()
        run.edits[-1].features.add().feature.sae = long
        run.edits[-1].condition.feature.sae = long
    run.features.saes.append(long)
    run.sae_options.add(sae=long)
    request = gs.GenerateRequest(run=run, request_id=long)
    reading_s = fastest_s(lambda: gs.GenerateRequest.FromString(request.SerializeToString()))
    assert fastest_s(lambda: refusal(request)) < reading_s  # a third of it, when this was written
    violations = refusal(request).violations
    assert len(violations) == 100
    assert max(len(one.description) for one in violations) <= 400
    assert max(len(one.field) for one in violations) <= 200
