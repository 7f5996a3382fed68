"""What every call has in common: who calls, a request id, bounds on what it holds, a line in the log, and errors with
details."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from opentelemetry.trace import Span

from turbolens_server.logs import get_logger
from turbolens_server.rpc import traces
from turbolens_server.rpc.admission import Account, Ledger
from turbolens_server.rpc.answers import Answers
from turbolens_server.rpc.callers import Caller, KnownCallers, address, identify, refused
from turbolens_server.rpc.check_pool import CheckPool
from turbolens_server.rpc.errors import RpcError, Stalled, malformed, stopping
from turbolens_server.rpc.metrics import Metrics

_CALL: Final[contextvars.ContextVar[Call]] = contextvars.ContextVar("call")
_OURS: Final = "/turbolens."
_PARSED_AT_ONCE: Final = 64 * 1024
"""Bytes of a message that the event loop parses itself; a larger one waits for a thread."""
_STALLED_WHILE_STOPPING_S: Final = 2.0
_ROOM_AGAIN_S: Final = 0.2
"""Between two looks for room for a stream's next message."""


def current_call() -> Call:
    """The call that is being served."""
    return _CALL.get()


def current_request_id() -> str:
    """The id of the call that is being served."""
    return _CALL.get().request_id


def current_deadline() -> float | None:
    """When the caller of the call that is being served stops waiting, on the event loop's clock; None: never."""
    return _CALL.get().deadline


def _usable(asked: Any) -> bool:
    return isinstance(asked, str) and 0 < len(asked) <= 128 and asked.isascii() and asked.isprintable()


class Call:
    """One call from its first bytes to its line in the log."""

    def __init__(
        self, method: str, caller: Caller, account: Account, context: Any, metrics: Metrics, span: Span
    ) -> None:
        self._context = context
        self._span = span
        self._metrics = metrics
        self._start = time.perf_counter()
        # Read now: asking a context that the caller has left for its peer can bring the process down.
        self._peer = context.peer()
        self._allowed_s = context.time_remaining()
        self.method = method
        self.caller = caller
        self.account = account
        asked = dict(context.invocation_metadata() or ()).get("x-request-id", "")
        self.request_id: str = asked if _usable(asked) else uuid.uuid4().hex
        """The caller's, else one made here."""
        self.deadline = None if self._allowed_s is None else asyncio.get_running_loop().time() + self._allowed_s
        """When its caller stops waiting, on the event loop's clock; None: never."""
        self.messages: int | None = None
        """Of a stream, those that were sent."""
        self.refused: RpcError | None = None
        """Why it may not even be read."""
        self.error: Exception | None = None
        _CALL.set(self)
        structlog.contextvars.bind_contextvars(request_id=self.request_id, method=method, caller=caller.name)
        if (trace_id := traces.trace_id(span)) is not None:
            structlog.contextvars.bind_contextvars(trace_id=trace_id)

    def name_after(self, request: Any) -> None:
        """Take the id that the request itself brings."""
        asked = getattr(request, "request_id", "")
        self.request_id = asked if _usable(asked) else self.request_id
        structlog.contextvars.bind_contextvars(request_id=self.request_id)

    def left(self) -> None:
        """The caller is gone, or its deadline has passed."""
        expired = self._allowed_s is not None and self._elapsed_s() >= self._allowed_s
        self._tell(grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED)

    async def end(self) -> None:
        """Tell how it went: the log, and of an error the caller; what was not foreseen becomes INTERNAL, without its
        inside."""
        if (error := self.error) is None:
            self._tell(grpc.StatusCode.OK)
            return
        if not isinstance(error, RpcError):
            get_logger().error("unexpected", exc_info=error)
            message = f"internal error; the server's log has it under request id {self.request_id}"
            error = RpcError(grpc.StatusCode.INTERNAL, message, "INTERNAL")
        self._tell(error.code, reason=error.reason)
        await self._context.abort(error.code, error.message, error.trailing_metadata(self.request_id))

    def _tell(self, code: grpc.StatusCode, **more: Any) -> None:
        traces.end_call(self._span, code, self.request_id, more.get("reason", ""))
        self._metrics.requests.labels(self.method, code.name).inc()
        self._metrics.request_seconds.labels(self.method).observe(self._elapsed_s())
        if code is grpc.StatusCode.CANCELLED:
            self._metrics.cancellations.inc()
        elif "reason" in more:
            self._metrics.refusals.labels(more["reason"]).inc()
        logger = get_logger()
        log = logger.warning if code is grpc.StatusCode.INTERNAL else logger.info
        if self.messages is not None:
            more["messages"] = self.messages
        log("rpc", code=code.name, duration_ms=round(self._elapsed_s() * 1000, 1), peer=self._peer, **more)

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._start


class Writers:
    """Streams that wait for their callers to read."""

    def __init__(self, stalled_s: float) -> None:
        self._stalled_s = stalled_s
        self._waiting: set[asyncio.Timeout] = set()

    async def write(self, context: Any, message: Any) -> None:
        """Send a message of a stream.

        Raises:
            Stalled: the caller takes nothing for too long.
        """
        try:
            async with asyncio.timeout(self._stalled_s) as limit:
                self._waiting.add(limit)
                try:
                    await context.write(message)
                finally:
                    self._waiting.discard(limit)
        except TimeoutError:
            raise Stalled(self._stalled_s, message.ByteSize()) from None

    def hurry(self) -> None:
        """The server stops: who does not read now will not have read by its end."""
        self._stalled_s = min(self._stalled_s, _STALLED_WHILE_STOPPING_S)
        soon = asyncio.get_running_loop().time() + self._stalled_s
        for limit in self._waiting:
            if (when := limit.when()) is not None:
                limit.reschedule(min(when, soon))


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio's stubs leave it untyped
    """Wraps every handler of our services; messages arrive here as bytes, so that nothing is parsed unasked."""

    def __init__(
        self, ledger: Ledger, checks: CheckPool, writers: Writers, metrics: Metrics, known: KnownCallers | None = None
    ) -> None:
        self._ledger = ledger
        self._known = known
        self._metrics = metrics
        self._answers = Answers(metrics.answers_again.inc)
        self._checks = checks
        self._writers = writers
        self._active = 0
        self._idle = asyncio.Event()
        self._stop = asyncio.Event()

    async def drain(self, within_s: float) -> bool:
        """Refuse what is new and wait for what is served; returns whether all of it ended in time.

        gRPC's own way waits for streams that nobody reads as well, though nothing of them is left here.
        """
        self._stop.set()
        self._writers.hurry()
        try:
            async with asyncio.timeout(within_s):
                while self._active:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

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
        answer = {"response_serializer": handler.response_serializer}
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(name, handler), **answer)
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(self._both_ways(name, handler), **answer)
        return grpc.unary_stream_rpc_method_handler(self._stream(name, handler), **answer)

    def _unary(self, name: str, handler: Any) -> Callable[[bytes, Any], Awaitable[Any]]:
        async def wrapped(message: bytes, context: Any) -> Any:
            with self._call(name, context) as call:
                request = await self._read(call, message, handler.request_deserializer)
                if getattr(request, "request_id", ""):
                    key = self._answers.key(call.caller.name, name, call.request_id, message)
                    answer = await self._answers.once(key, lambda: handler.unary_unary(request, context))
                else:
                    answer = await handler.unary_unary(request, context)
            await call.end()
            return answer

        return wrapped

    def _stream(self, name: str, handler: Any) -> Callable[[bytes, Any], Awaitable[None]]:
        async def wrapped(message: bytes, context: Any) -> None:
            with self._call(name, context) as call:
                request = await self._read(call, message, handler.request_deserializer)
                await self._write(call, handler.unary_stream(request, context), context)
            await call.end()

        return wrapped

    def _both_ways(self, name: str, handler: Any) -> Callable[[AsyncIterator[bytes], Any], Awaitable[None]]:
        async def wrapped(messages: AsyncIterator[bytes], context: Any) -> None:
            with self._call(name, context) as call:
                arrivals = self._arrivals(call, messages, handler.request_deserializer)
                await self._write(call, handler.stream_stream(arrivals, context), context)
            await call.end()

        return wrapped

    async def _write(self, call: Call, answers: AsyncIterator[Any], context: Any) -> None:
        call.messages = 0
        async with contextlib.aclosing(answers):  # type: ignore[type-var]  # it is a generator
            async for answer in answers:
                await self._writers.write(context, answer)
                call.messages += 1

    async def _arrivals(
        self, call: Call, messages: AsyncIterator[bytes], parse: Callable[[bytes], Message]
    ) -> AsyncIterator[tuple[Message, Account]]:
        """A stream's requests, each with an account of its own; where there is no room for one, it waits.

        Raises:
            RpcError: what its caller was refused for; UNAVAILABLE once the server stops, INVALID_ARGUMENT where one is
                none.
        """
        if call.refused is not None:
            raise call.refused
        stops = asyncio.ensure_future(self._stop.wait())
        try:
            while True:
                arrives = asyncio.ensure_future(anext(messages, None))
                await asyncio.wait((arrives, stops), return_when=asyncio.FIRST_COMPLETED)
                if self._stop.is_set():
                    arrives.cancel()
                    raise stopping()
                if (message := await arrives) is None:
                    return
                account = self._ledger.account(call.caller)
                try:
                    while not _has_room(account, len(message)):
                        await asyncio.sleep(_ROOM_AGAIN_S)
                    request = await self._parse(message, parse)
                except BaseException:
                    account.close()
                    raise
                yield request, account
        finally:
            stops.cancel()

    @contextlib.contextmanager
    def _call(self, name: str, context: Any) -> Iterator[Call]:
        """A call while it is served. An error is kept for its end, which gives back first what the call held: telling
        a caller who does not read can take as long as it likes."""
        peer = context.peer()
        try:
            caller = identify(peer, context, self._known)
            denied = refused(caller, name)
        except RpcError as error:
            caller, denied = Caller(address(peer)), error
        self._active += 1
        try:
            metadata = dict(context.invocation_metadata() or ())
            with self._ledger.account(caller) as account, traces.of_call(name, metadata) as span:
                call = Call(name, caller, account, context, self._metrics, span)
                call.refused = denied
                try:
                    yield call
                except asyncio.CancelledError:
                    call.left()
                    raise
                except Exception as error:
                    call.error = error
                    account.refused = isinstance(error, RpcError) and error.retry_after_s is not None
            if isinstance(call.error, Stalled):
                self._ledger.hold_after(caller, call.error.message_bytes, context)
        finally:
            self._active -= 1
            self._idle.set()

    async def _read(self, call: Call, message: bytes, parse: Callable[[bytes], Message]) -> Message:
        """The request.

        Raises:
            RpcError: what its caller was refused for; UNAVAILABLE where the server stops, RESOURCE_EXHAUSTED where
                there is no room for it, INVALID_ARGUMENT where it is none.
        """
        if call.refused is not None:
            raise call.refused
        if self._stop.is_set():
            raise stopping()
        call.account.hold_message(len(message))
        request = await self._parse(message, parse)
        call.name_after(request)
        return request

    async def _parse(self, message: bytes, parse: Callable[[bytes], Message]) -> Message:
        try:
            return parse(message) if len(message) <= _PARSED_AT_ONCE else await self._checks.run(parse, message)
        except DecodeError:
            raise malformed(getattr(parse, "__self__", Message).DESCRIPTOR.full_name) from None


def _has_room(account: Account, count: int) -> bool:
    """Whether a message of a stream is held now; raises where it never can be."""
    try:
        account.hold_message(count)
    except RpcError as error:
        if error.retry_after_s is None:
            raise
        return False
    return True
