"""Requests that no honest caller sends, made of honest ones: fields at and past their edges, bytes spoiled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message

from turbolens_proto.v1 import feature_service_pb2, generation_service_pb2, model_service_pb2, run_pb2, steering_pb2

_TEXTS: Final = (
    "", "mid.0", "nested", "temporal", "up.0.1.attn2.0.z",
    "up.0.0", "down.2.1", "mini", "a red star", "mid.0/features/3", "features/mid.0/3", "\x00", "\n{}",
    "../../etc/passwd", "%s%n", "é漢🙂", "\u202e", "a" * 3000, "label:star", 'label:"', "-frequency", "models/mini",
)  # fmt: skip
_WHOLE: Final = (0, 1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 100, 128, 255, 256, 512, 4096, -1, 2**31 - 1, -(2**31))
_LARGE: Final = (*_WHOLE, 2**32, 2**63 - 1, -(2**63))
_FLOATS: Final = (
    0.0,
    -0.0,
    0.25,
    0.5,
    1.0,
    -1.0,
    2.0,
    10.0,
    1e3,
    1e9,
    3e38,
    -3e38,
    1e-40,
    float("nan"),
    float("inf"),
    float("-inf"),
)
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_HUGE_PNG: Final = _PNG + b"\x00\x00\x00\rIHDR\xff\xff\xff\xff\xff\xff\xff\xff\x08\x00"
_BYTES: Final = (b"", b"\x00", _PNG, _HUGE_PNG, b"\xff" * 64)
_DEEP: Final = 6


def methods() -> list[MethodDescriptor]:
    """Every method of the contract."""
    files = (model_service_pb2, feature_service_pb2, generation_service_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return [method for service in services for method in service.methods]


def request_class(method: MethodDescriptor) -> type[Message]:
    """What a method takes."""
    return message_factory.GetMessageClass(method.input_type)


def honest(method: MethodDescriptor, draw: random.Random) -> Message:
    """A request that can be served."""
    run = run_pb2.Run(
        source=run_pb2.Source(prompt=run_pb2.PromptSource(text="a red star")),
        sampling=run_pb2.Sampling(steps=1),
        seeds=[draw.randrange(1000)],
    )
    if draw.random() < 0.7:
        feature = steering_pb2.WeightedFeature(feature=steering_pb2.FeatureRef(sae="mid.0", index=draw.randrange(64)))
        edit = steering_pb2.Edit(features=[feature], add=steering_pb2.AddEdit(strength=1.0, unit=steering_pb2.UNIT_RAW))
        box = steering_pb2.Box(left=0, top=0, right=0.5, bottom=1)
        edit.mask.boxes.boxes.append(box)
        run.edits.append(edit)
    if draw.random() < 0.5:
        run.features.saes.append("mid.0")
    if draw.random() < 0.1:
        run.gate = True
    if draw.random() < 0.1:
        run.more_prompts.append("a blue ring")
    if draw.random() < 0.1:
        run.regions.add(prompt="a blue ring").mask.boxes.boxes.add(left=0.5, top=0, right=1, bottom=1)
    if draw.random() < 0.1:
        run.features.saes.append("nested")
        run.sae_options.add(sae="nested", k=draw.choice((1, 8, 20)))
    request = request_class(method)()
    if method.name == "AttributeFeature":
        run.ClearField("features")
        run.ClearField("more_prompts")
        request.feature.sae, request.feature.index = "up.0.1.attn2.0.z", draw.randrange(64)  # type: ignore[attr-defined]
    if "run" in method.input_type.fields_by_name:
        request.run.CopyFrom(run)  # type: ignore[attr-defined]
    elif "request" in method.input_type.fields_by_name:
        request.request.run.CopyFrom(run)  # type: ignore[attr-defined]
    elif "query" in method.input_type.fields_by_name:
        request.query = "star"  # type: ignore[attr-defined]
    return request


def value_of(field: FieldDescriptor, draw: random.Random, depth: int) -> Any:
    """A value at or past an edge of its type."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        assert field.message_type is not None
        made = message_factory.GetMessageClass(field.message_type)()
        scatter(made, draw, depth + 1)
        return made
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return draw.choice(_BYTES if field.type == FieldDescriptor.TYPE_BYTES else _TEXTS)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return draw.choice(_FLOATS)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return draw.choice((0, 1, 2, 3, 4, 9, 2**31 - 1))
    wide = field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
    number = draw.choice(_LARGE if wide else _WHOLE)
    unsigned = field.cpp_type in (FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_UINT32)
    return abs(number) if unsigned else number


def scatter(message: Message, draw: random.Random, depth: int = 0) -> None:
    """Set some fields of a message, at every depth, to values at or past their edges."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    for field in draw.sample(fields, min(len(fields), draw.choice((1, 1, 2, 3)))):
        if field.message_type is not None and depth >= _DEEP:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key = draw.choice(_TEXTS)
            scatter(getattr(message, field.name)[key], draw, depth + 1)
        elif field.is_repeated:
            count = draw.choice((0, 1, 1, 2, 3, 40))
            getattr(message, field.name).extend(value_of(field, draw, depth) for _ in range(count))
        elif field.message_type is not None:
            # Into what is there, so that most of an honest request stays honest.
            scatter(getattr(message, field.name), draw, depth + 1)
        else:
            setattr(message, field.name, value_of(field, draw, depth))


def damage(data: bytes, draw: random.Random) -> bytes:
    """Bytes of a message with some changed, left out, doubled or put in."""
    spoiled = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(spoiled) + 1)
        end = min(len(spoiled), at + draw.choice((1, 2, 8)))
        match draw.randrange(4):
            case 0 if at < len(spoiled):
                spoiled[at] = draw.randrange(256)
            case 1:
                del spoiled[at:end]
            case 2:
                spoiled[at:at] = spoiled[at:end] * draw.choice((1, 2, 50))
            case _:
                spoiled[at:at] = draw.randbytes(draw.choice((1, 2, 8, 64)))
    return bytes(spoiled)


def bad_request(method: MethodDescriptor, draw: random.Random, kept: Sequence[bytes] = ()) -> bytes:
    """One request as bytes: the fields of an honest one, or of one of those kept, its bytes, or both, spoiled."""
    request = honest(method, draw)
    if kept and draw.random() < 0.5:
        chosen = draw.choice(kept)
        try:
            request = request_class(method).FromString(chosen)
        except DecodeError:
            return damage(chosen, draw)
    how = draw.randrange(4)
    if how != 0:
        for _ in range(draw.choice((1, 1, 2, 4))):
            scatter(request, draw)
    data = request.SerializeToString()
    return damage(data, draw) if how in (0, 1) else data
