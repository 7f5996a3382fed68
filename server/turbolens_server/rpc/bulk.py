"""Very many runs over one stream: each item queues and is answered as a request of its own; a bounded number is held.

An item is held from the arrival of its message until its answer is taken. While as many lanes are held as the window
allows nothing more is read, so that gRPC's flow control holds the caller back, whether the engine or the caller's own
reading is what is slow.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Final, TypeAlias, TypeVar

import grpc

from turbolens_proto.v1 import feature_service_pb2 as pb
from turbolens_server.engine.types import lanes_of
from turbolens_server.logs import get_logger
from turbolens_server.rpc.admission import Account
from turbolens_server.rpc.errors import RpcError, bad_request
from turbolens_server.rpc.queue import QueueLimits

T = TypeVar("T")
Item: TypeAlias = pb.ExtractFeaturesBatchRequest
Answer: TypeAlias = pb.ExtractFeaturesBatchResponse
Arrivals: TypeAlias = AsyncIterator[tuple[Item, Account]]
"""Items as they are read, each with the account of what it holds."""
_LONGEST_WAIT_S: Final = 1.0


def window(limits: QueueLimits) -> int:
    """Lanes that one stream may hold: a batch that runs, and one that waits in at most half of the queue."""
    return limits.max_batch + max(1, min(limits.max_batch, limits.max_queue // 2, limits.max_queue_pictures // 2))


async def answer_all(
    arrivals: Arrivals, run: Callable[[Item, Account], Awaitable[Answer]], most: int
) -> AsyncGenerator[Answer, None]:
    """Answers to items as they end; closing it ends every item at once.

    Args:
        arrivals: read one at a time, and only while fewer than `most` lanes are held.
        run: the answer to one item; what is wrong with the item is an answer too.
        most: lanes held at a time; an item of more lanes than are left is still taken.

    Raises:
        RpcError: what ended the arrivals, after the answers to those before.
    """
    done: asyncio.Queue[tuple[Answer, Account, int] | Exception | None] = asyncio.Queue()
    accounts: set[Account] = set()
    running: set[asyncio.Task[None]] = set()
    taken = asyncio.Event()
    held = 0

    async def one(item: Item, account: Account, lanes: int) -> None:
        done.put_nowait((await run(item, account), account, lanes))

    async def read() -> None:
        nonlocal held
        failure: Exception | None = None
        try:
            async for item, account in arrivals:
                accounts.add(account)
                lanes = _lanes(item)
                held += lanes
                task = asyncio.create_task(one(item, account, lanes))
                running.add(task)
                task.add_done_callback(running.discard)
                while held >= most:
                    taken.clear()
                    await taken.wait()
        except Exception as error:
            failure = error
        await asyncio.gather(*running)
        done.put_nowait(failure)

    reader = asyncio.create_task(read())
    try:
        while isinstance(ended := await done.get(), tuple):
            answer, account, lanes = ended
            yield answer
            account.close()
            accounts.discard(account)
            held -= lanes
            taken.set()
        if ended is not None:
            raise ended
    finally:
        tasks = (reader, *running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for account in accounts:
            account.close()


async def when_there_is_room(step: Callable[[], Awaitable[T]]) -> T:
    """What a step comes to; where the server is full, it is asked again at the time that it tells."""
    while True:
        try:
            return await step()
        except RpcError as error:
            if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED or error.retry_after_s is None:
                raise
            wait = min(error.retry_after_s, _LONGEST_WAIT_S)
        await asyncio.sleep(wait)


async def answer_one(item: Item, response: Awaitable[pb.ExtractFeaturesResponse]) -> Answer:
    """An item's answer: its response, or the error that it came to."""
    try:
        return Answer(item=item.item, response=await response)
    except RpcError as error:
        return Answer(item=item.item, error=_item_error(error))
    except Exception as error:
        get_logger().error("unexpected", exc_info=error, item=item.item)
        message = "internal error; the server's log has it under the stream's request id"
        return Answer(item=item.item, error=_item_error(RpcError(grpc.StatusCode.INTERNAL, message, "INTERNAL")))


def _lanes(item: Item) -> int:
    run = item.request.run
    return (
        (1 + len(run.more_prompts))
        * max(1, len(run.seeds))
        * lanes_of(len(run.references), guided=run.sampling.guidance_scale > 1)
    )


def _item_error(error: RpcError) -> pb.ItemError:
    told = bad_request(error.violations).field_violations
    violations = [pb.FieldViolation(field=v.field, description=v.description) for v in told]
    return pb.ItemError(code=error.code.value[0], message=error.message, reason=error.reason, violations=violations)
