"""Server reflection, under both names that tools ask for: `v1alpha`, and `v1`, which is the same messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

_V1: Final = "grpc.reflection.v1.ServerReflection"


class _V1Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio's stubs leave it untyped
    def __init__(self, servicer: Any) -> None:
        self._handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handler if handler_call_details.method == f"/{_V1}/ServerReflectionInfo" else None


def _described(services: Sequence[str]) -> Any:
    """The files of services and of `v1`, which grpcio-reflection does not bring.

    In a pool of their own: in everybody's, a program that brings `v1` itself would find it taken.
    """
    everybodys, pool = descriptor_pool.Default(), descriptor_pool.DescriptorPool()
    added: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name not in added:
            added.add(file.name)
            for needed in file.dependencies:
                add(needed)
            pool.AddSerializedFile(file.serialized_pb)

    for service in services:
        add(everybodys.FindFileContainingSymbol(service))
    alpha = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    v1 = text_format.MessageToString(alpha).replace("reflection.v1alpha", "reflection.v1")
    v1 = v1.replace("reflection/v1alpha", "reflection/v1")
    pool.Add(text_format.Parse(v1, descriptor_pb2.FileDescriptorProto()))
    return pool


def enable_reflection(services: Sequence[str], server: Any) -> None:
    """Let tools list the services of a `grpc.aio` server and read their messages."""
    known = (*services, reflection.SERVICE_NAME)
    names, pool = (*known, _V1), _described(known)
    reflection.enable_server_reflection(names, server, pool)
    server.add_generic_rpc_handlers((_V1Handler(reflection.aio.ReflectionServicer(names, pool)),))
