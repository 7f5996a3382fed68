"""Server reflection, under both names that tools ask for: `v1alpha`, and `v1`, which is the same messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

_V1: Final = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


class _V1Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio's stubs leave it untyped
    def __init__(self, servicer: Any) -> None:
        self._handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handler if handler_call_details.method == _V1 else None


def enable_reflection(services: Sequence[str], server: Any) -> None:
    """Let tools list the services of a `grpc.aio` server and read their messages."""
    names = (*services, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    server.add_generic_rpc_handlers((_V1Handler(reflection.aio.ReflectionServicer(names)),))
