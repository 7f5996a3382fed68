"""Requests as messages, from fields of the request and of its run side by side."""

from __future__ import annotations

from typing import Any

from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import run_pb2

_RUN = set(run_pb2.Run.DESCRIPTOR.fields_by_name)


def _fields(fields: dict[str, Any]) -> dict[str, Any]:
    """`prompt` stands for the source that it is."""
    prompt = fields.pop("prompt", None)
    run = {name: fields.pop(name) for name in _RUN & fields.keys()}
    if prompt is not None:
        run["source"] = {"prompt": {"text": prompt}}
    return {"run": run, **fields}


def generate(**fields: Any) -> gs.GenerateRequest:
    return gs.GenerateRequest(**_fields(fields))


def stream_generate(**fields: Any) -> gs.StreamGenerateRequest:
    return gs.StreamGenerateRequest(**_fields(fields))


def extract(**fields: Any) -> fs.ExtractFeaturesRequest:
    return fs.ExtractFeaturesRequest(**_fields(fields))


def stream_features(**fields: Any) -> fs.StreamFeaturesRequest:
    return fs.StreamFeaturesRequest(**_fields(fields))
