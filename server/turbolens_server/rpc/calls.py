"""What every call has in common: a request id, a line in the log, and errors with details."""

from __future__ import annotations

import asyncio
import contextvars
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc

from turbolens_server.logs import get_logger
from turbolens_server.rpc.errors import RpcError

_REQUEST_ID: Final = contextvars.ContextVar("request_id", default="")
_DEADLINE: Final = contextvars.ContextVar[float | None]("deadline", default=None)
_OURS: Final = "/turbolens."


def current_request_id() -> str:
    """The id of the call that is being served."""
    return _REQUEST_ID.get()


def current_deadline() -> float | None:
    """When the caller of the call that is being served stops waiting, on the event loop's clock; None: never."""
    return _DEADLINE.get()


def _find_request_id(request: Any, context: Any) -> str:
    asked = getattr(request, "request_id", "") or dict(context.invocation_metadata() or ()).get("x-request-id", "")
    usable = isinstance(asked, str) and 0 < len(asked) <= 128 and asked.isascii() and asked.isprintable()
    return asked if usable else uuid.uuid4().hex


class _Call:
    """One call from its request to its line in the log."""

    def __init__(self, method: str, request: Any, context: Any) -> None:
        self._context = context
        self._start = time.perf_counter()
        self._id = _find_request_id(request, context)
        _REQUEST_ID.set(self._id)
        # Read now: asking a context that the caller has left for its peer can bring the process down.
        self._peer = context.peer()
        self._allowed_s = context.time_remaining()
        _DEADLINE.set(None if self._allowed_s is None else asyncio.get_running_loop().time() + self._allowed_s)
        self._log = get_logger().bind(request_id=self._id, method=method)

    def done(self, code: grpc.StatusCode, **more: Any) -> None:
        duration = round(self._elapsed_s() * 1000, 1)
        log = self._log.warning if code is grpc.StatusCode.INTERNAL else self._log.info
        log("rpc", code=code.name, duration_ms=duration, peer=self._peer, **more)

    def left(self, **more: Any) -> None:
        """The caller is gone, or its deadline has passed."""
        expired = self._allowed_s is not None and self._elapsed_s() >= self._allowed_s
        self.done(grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED, **more)

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    async def fail(self, error: Exception) -> None:
        """Answer with an error; what was not foreseen becomes INTERNAL, without its inside."""
        if not isinstance(error, RpcError):
            self._log.error("unexpected", exc_info=error)
            message = f"internal error; the server's log has it under request id {self._id}"
            error = RpcError(grpc.StatusCode.INTERNAL, message, "INTERNAL")
        self.done(error.code, reason=error.reason)
        await self._context.abort(error.code, error.message, error.trailing_metadata(self._id))


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio's stubs leave it untyped
    """Wraps every handler of our services."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_OURS):
            return handler
        name = method.removeprefix("/")
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_unary(name, handler.unary_unary), **codecs)
        return grpc.unary_stream_rpc_method_handler(_stream(name, handler.unary_stream), **codecs)


def _unary(name: str, handle: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def wrapped(request: Any, context: Any) -> Any:
        call = _Call(name, request, context)
        try:
            answer = await handle(request, context)
        except asyncio.CancelledError:
            call.left()
            raise
        except Exception as error:
            await call.fail(error)
            raise AssertionError("abort raises") from error
        call.done(grpc.StatusCode.OK)
        return answer

    return wrapped


def _stream(name: str, handle: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def wrapped(request: Any, context: Any) -> AsyncIterator[Any]:
        call = _Call(name, request, context)
        messages = 0
        try:
            async for answer in handle(request, context):
                messages += 1
                yield answer
        except (asyncio.CancelledError, GeneratorExit):
            call.left(messages=messages)
            raise
        except Exception as error:
            await call.fail(error)
            raise AssertionError("abort raises") from error
        call.done(grpc.StatusCode.OK, messages=messages)

    return wrapped
