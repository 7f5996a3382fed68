"""Many questions at once, within a window, answered in order; and the stream that carries those for features."""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import grpc

from turbolens._errors import EXCEPTIONS, FieldViolation, TurboLensError, from_rpc_error
from turbolens_proto.v1 import feature_service_pb2 as pb

T = TypeVar("T")
R = TypeVar("R")
_OF_THE_ITEM: Final = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE", "NOT_FOUND")
_SICK: Final = 8
"""Items in a row that fail by the server's own fault: then it is the server, and no item of theirs."""
_AGAIN: Final = 2
"""More tries of an item that fails by the server's own fault."""
_PASSING: Final = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN")
"""How a stream ends that is worth beginning again."""
_AWAY: Final = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "DEADLINE_EXCEEDED")
_BACKOFF_S: Final = (0.2, 10.0)


async def in_order(
    items: Iterable[T], ask: Callable[[T], Awaitable[R]], most: int
) -> AsyncGenerator[tuple[T, R], None]:
    """Answers in order of the items, of which at most `most` are under way; no further is read than that."""
    asked: collections.deque[tuple[T, asyncio.Future[R]]] = collections.deque()
    try:
        for item in items:
            asked.append((item, asyncio.ensure_future(ask(item))))
            if len(asked) >= most:
                first, answer = asked.popleft()
                yield first, await answer
        while asked:
            first, answer = asked.popleft()
            yield first, await answer
    finally:
        for _, answer in asked:
            answer.cancel()
        await asyncio.gather(*(answer for _, answer in asked), return_exceptions=True)


def is_of_the_item(error: TurboLensError) -> bool:
    """Whether an error says that this item cannot be made, by any server, now or later."""
    return error.code in _OF_THE_ITEM or error.reason == "NON_FINITE"


class Sickness:
    """Tells a server that fails from items that cannot be made."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def check(self, error: TurboLensError | None) -> None:
        """Raises the error of one item too many."""
        self._in_a_row = 0 if error is None or is_of_the_item(error) else self._in_a_row + 1
        if error is not None and self._in_a_row >= _SICK:
            raise error


class Broken(Exception):
    """The stream cannot be mended, and so nothing more can be asked."""

    def __init__(self, error: TurboLensError) -> None:
        super().__init__(str(error))
        self.error = error


async def try_again(ask: Callable[[], Awaitable[R]], patience_s: float) -> R | TurboLensError:
    """An answer, or the error that it comes to; a server that is full or away is asked again for `patience_s`.

    Raises:
        Broken: it stayed away.
    """
    until, tries, failures = time.monotonic() + patience_s, 0, 0
    while True:
        try:
            return await ask()
        except TurboLensError as error:
            if is_of_the_item(error):
                return error
            if error.code in _AWAY:
                if time.monotonic() > until:
                    raise Broken(error) from None
            elif failures == _AGAIN:
                return error
            else:
                failures += 1
            wait = _backoff_s(tries, error)
        tries += 1
        await asyncio.sleep(wait)


class Batch:
    """The stream of ExtractFeaturesBatch: questions in, answers out, begun again where it breaks."""

    def __init__(self, open_stream: Callable[[AsyncIterator[Any]], Any], target: str, patience_s: float) -> None:
        """Begin.

        Args:
            open_stream: a call, from its requests.
            target: for errors.
            patience_s: without any answer, after which a broken stream is not begun again.
        """
        self._open_stream, self._target, self._patience_s = open_stream, target, patience_s
        self._waiting: dict[int, tuple[pb.ExtractFeaturesBatchRequest, asyncio.Future[Any]]] = {}
        self._to_send: asyncio.Queue[int | None] = asyncio.Queue()
        self._next = 0
        self._heard = time.monotonic()
        self._failure: TurboLensError | None = None
        self._task = asyncio.create_task(self._run())

    async def extract(self, request: pb.ExtractFeaturesRequest) -> pb.ExtractFeaturesResponse:
        """The answer to one request.

        Raises:
            TurboLensError: of the item.
        Broken: the stream cannot be mended.
        """
        if self._failure is not None:
            raise Broken(self._failure)
        number, self._next = self._next, self._next + 1
        answer: asyncio.Future[pb.ExtractFeaturesResponse] = asyncio.get_running_loop().create_future()
        self._waiting[number] = pb.ExtractFeaturesBatchRequest(item=number, request=request), answer
        self._to_send.put_nowait(number)
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """End it; the server then stops at once what is left."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        tries = 0
        while True:
            heard = self._heard
            self._to_send = asyncio.Queue()
            for number in self._waiting:
                self._to_send.put_nowait(number)
            try:
                await self._read(self._open_stream(self._requests(self._to_send)))
                error = TurboLensError(f"{self._target} ended the stream", code="UNAVAILABLE")
            except grpc.RpcError as failure:
                error = from_rpc_error(failure, self._target)
            except Exception as failure:
                error = TurboLensError(f"the stream to {self._target} failed: {failure}")
            tries = 0 if self._heard > heard else tries + 1
            # Nothing of a stream says at what it failed: time without an answer counts from when one was waited for.
            if error.code not in _PASSING or (tries and time.monotonic() - self._heard > self._patience_s):
                self._failure = error
                for _, answer in self._waiting.values():
                    if not answer.done():
                        answer.set_exception(Broken(error))
                return
            await asyncio.sleep(_backoff_s(tries, error))

    async def _requests(self, to_send: asyncio.Queue[int | None]) -> AsyncIterator[pb.ExtractFeaturesBatchRequest]:
        while (number := await to_send.get()) is not None:
            if number in self._waiting:
                yield self._waiting[number][0]

    async def _read(self, call: Any) -> None:
        try:
            async for message in call:
                self._heard = time.monotonic()
                _, answer = self._waiting.get(message.item, (None, None))
                if answer is None or answer.done():
                    continue
                if message.WhichOneof("outcome") == "response":
                    answer.set_result(message.response)
                else:
                    answer.set_exception(_error_of(message.error))
        finally:
            call.cancel()


def _error_of(message: pb.ItemError) -> TurboLensError:
    codes = {code.value[0]: code for code in grpc.StatusCode}
    code = codes.get(message.code, grpc.StatusCode.UNKNOWN)
    violations = tuple(FieldViolation(v.field, v.description) for v in message.violations)
    kind = EXCEPTIONS.get(code, TurboLensError)
    return kind(message.message, code=code.name, reason=message.reason, violations=violations)


def _backoff_s(tries: int, error: TurboLensError) -> float:
    least, most = _BACKOFF_S
    wait: float = min(least * 2 ** min(tries, 16), most)
    return max(error.retry_after or 0.0, wait) * (1 + random.random() / 4)  # no secret


def failed(error: TurboLensError) -> str:
    """An error in a line, for tables."""
    fields: Sequence[FieldViolation] = error.violations[1:]
    return "; ".join([error.message.partition("\n")[0], *map(str, fields)])
