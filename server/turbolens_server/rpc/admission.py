"""What requests hold while they are served, counted and bounded.

A request holds memory from the arrival of its message to the moment its answer is on its way: its message, and what it
will come to. Both are counted when it is let in, from the request alone: an estimate that is cheap and errs upwards is
worth more than a measurement that comes too late. So a caller who never reads keeps what it holds, and it is others'
requests that are let in or not, never memory that runs out.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final

from turbolens_server.engine.info import EngineInfo
from turbolens_server.engine.types import Job, attribution_values
from turbolens_server.rpc.callers import Caller
from turbolens_server.rpc.errors import RpcError, Violation, invalid, overloaded

SHARE: Final = 8
"""How much of a bounded thing one caller may have: this many times what it leaves free. One alone gets 8 of 9 parts,
two get 8 of 17 each: whoever comes next finds room, however greedy those before were."""
_PARSED: Final = 8
"""Bytes of memory for a byte of message, about at most."""
_CODED: Final = 2
"""A picture is held as pixels, and then as a file of no more than those."""
_ENTRY_BYTES: Final = 16
"""One active feature at one position: index and activation, in the engine's form and in the message's."""
_UNBOUNDED_K: Final = 256
"""Active features at a position that an SAE without a bound is counted with."""


class Ledger:
    """Bytes held, in all and by caller. Belongs to one event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._by_caller: collections.Counter[str] = collections.Counter()

    def account(self, caller: Caller) -> Account:
        """What one call holds, or one item of a stream; closed at its end whatever happens."""
        return Account(self, caller)

    def give_back(self, caller: str, count: int) -> None:
        """Hold less."""
        self._change(caller, -count)

    def take(self, caller: str, count: int, *, shared: bool) -> None:
        """Hold more; `shared`: no more of it than a caller's share.

        Raises:
            RpcError: RESOURCE_EXHAUSTED where that much is not free, or not for this caller; INVALID_ARGUMENT where it
                never will be.
        """
        most_of_one = self.most * SHARE // (SHARE + 1)
        if count > most_of_one:
            text = f"the request needs about {_mib(count)} of memory while it is served; at most {_mib(most_of_one)}"
            raise invalid([Violation("", f"{text} are given to one: ask for fewer pictures or features at once")])
        free = self.most - self.held - count
        if free < 0 or (shared and self._by_caller[caller] + count > SHARE * free):
            raise overloaded(f"requests hold {_mib(self.held)} of {_mib(self.most)}", 1.0, "MEMORY_FULL")
        self._change(caller, count)

    def hold_after(self, caller: Caller, count: int, call: Any) -> None:
        """Hold what gRPC still has of a call that ended here, until it has ended there."""
        self._change(caller.name, count)
        call.add_done_callback(lambda _: self._change(caller.name, -count))

    def _change(self, caller: str, count: int) -> None:
        self.held += count
        self._by_caller[caller] += count
        if not self._by_caller[caller]:
            del self._by_caller[caller]


class Account:
    """What one call or item holds, until it is closed; a second time does nothing."""

    def __init__(self, ledger: Ledger, caller: Caller) -> None:
        self._ledger = ledger
        self._caller = caller
        self.held = 0
        self.pictures = 0
        self.refused = False
        """The call was refused for now: its pictures are none of its caller's quota."""

    def close(self) -> None:
        """Give it all back."""
        held, self.held = self.held, 0
        self._ledger.give_back(self._caller.name, held)
        pictures, self.pictures = self.pictures, 0
        if self._caller.quota is not None:
            self._caller.quota.give_back(pictures, used=not self.refused)

    def __enter__(self) -> Account:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hold_message(self, count: int) -> None:
        """Hold a message of so many bytes on the wire, and what it is parsed to; raises as :meth:`Ledger.take`."""
        self._hold(count * _PARSED, shared=False)

    def hold_answer(self, count: int, pictures: int) -> None:
        """Hold what the call will come to; raises as :meth:`Ledger.take`, and as its caller's quota."""
        self._hold(count, shared=True)
        if self._caller.quota is None:
            return
        try:
            self._caller.quota.take(pictures)
        except RpcError:
            self.held -= count
            self._ledger.give_back(self._caller.name, count)
            raise
        self.pictures += pictures

    def _hold(self, count: int, *, shared: bool) -> None:
        self._ledger.take(self._caller.name, count, shared=shared)
        self.held += count


def bytes_of(jobs: Sequence[Job], info: EngineInfo) -> int:
    """About what the jobs of a request take until they are delivered: pixels and latents that they start from, which
    may be many times their file and which they share, and their results."""
    starts = {start for job in jobs for start in (job.start, *(one.start for one in job.references)) if start}
    return sum(start.values.nbytes for start in starts) + sum(_result_bytes(job, info) for job in jobs)


def _result_bytes(job: Job, info: EngineInfo) -> int:
    pictures = job.picture + (job.steps - 1 if job.previews else 0)
    total = pictures * job.height * job.width * 3 * _CODED + job.height * job.width // 4
    points = {point.name: point for point in info.hook_points}
    for name in job.saes:
        rows, columns = points[info.saes[name].hook_point].grid(job.height, job.width)
        k = info.saes[name].bundle.k or _UNBOUNDED_K
        total += job.steps * rows * columns * k * _ENTRY_BYTES
    if job.attribute is not None:
        point = info.saes[job.attribute.sae].hook_point
        rows, columns = points[point].grid(job.height, job.width)
        values = attribution_values(point, rows * columns, info.max_prompt_tokens * (1 + len(job.regions)))
        total += 8 * values  # in the engine's form and in the message's
    return total


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
