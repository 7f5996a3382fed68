"""The policy of the queue: what it promises of every order of arrivals, departures and batches."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.engine.batcher import Batcher, batch_key
from turbolens_server.engine.types import Job

MAX_BATCH = 4


def jobs(count: int, steps: int = 1) -> list[Job]:
    return [Job("", seed, steps, 64, 64) for seed in range(count)]


def names(batch) -> list[tuple[str, int]]:
    return [(slot.request, slot.index) for slot in batch]


def drain(queue: Batcher) -> list[list[tuple[str, int]]]:
    return [names(batch) for batch in iter(queue.take, [])]


def test_what_piled_up_runs_together():
    queue = Batcher(MAX_BATCH, 0)
    for name in "abc":
        queue.add(name, jobs(1))
    assert drain(queue) == [[("a", 0), ("b", 0), ("c", 0)]]


def test_a_large_request_shares_with_a_small_one_that_came_later():
    queue = Batcher(MAX_BATCH, 0)
    queue.add("large", jobs(12))
    queue.add("small", jobs(1))
    first, *rest = drain(queue)
    assert ("small", 0) in first
    assert [len(batch) for batch in (first, *rest)] == [4, 4, 4, 1]


def test_another_shape_waits_for_its_turn_and_not_longer():
    queue = Batcher(MAX_BATCH, 0)
    queue.add("a", jobs(2))
    queue.add("other", jobs(1, steps=4))
    for name in "bcdefg":
        queue.add(name, jobs(1))
    assert drain(queue)[:2] == [[("a", 0), ("a", 1), ("b", 0), ("c", 0)], [("other", 0)]]


def test_only_a_shared_batch_makes_the_next_one_wait_for_its_callers():
    queue = Batcher(MAX_BATCH, wait_s=0.5)
    assert queue.start_at() is None
    queue.add("alone", jobs(3))
    assert queue.start_at() == 0
    queue.ended(queue.take(), 0.0, 10.0)
    queue.add("alone again", jobs(1))
    assert queue.start_at() == 0
    queue.add("b", jobs(1))
    queue.ended(queue.take(), 10.0, 20.0)
    queue.add("a", jobs(1))
    assert queue.start_at() == 20.5
    queue.add("b", jobs(1))
    assert queue.start_at() == 0  # as many as last time: nobody is missing


def test_a_caller_who_shared_a_batch_is_waited_for_and_no_longer_than_a_tenth_of_it():
    queue = Batcher(MAX_BATCH, wait_s=0.005)
    queue.add("one", jobs(1), "modest")
    queue.add("much", jobs(6), "greedy")
    batch = queue.take()
    assert [slot.caller for slot in batch] == ["modest", "greedy"]
    queue.ended(batch, 10.0, 10.25)
    assert queue.start_at() == pytest.approx(10.275)
    queue.drop("much")
    queue.add("less", jobs(1), "greedy")
    queue.add("again", jobs(1), "modest")
    assert queue.start_at() == 0  # nobody is missing
    queue.ended(queue.take(), 11.0, 11.01)
    queue.add("again", jobs(1), "modest")
    assert queue.start_at() == pytest.approx(11.015)  # a tenth of a short one is less than it waits anyway


def test_a_caller_of_many_requests_is_not_waited_for_longer_and_nobody_is_where_waiting_is_off():
    for wait_s, caller, expected in ((0.005, "a", 10.005), (0.0, "b", 0.0)):
        queue = Batcher(MAX_BATCH, wait_s)
        queue.add("first", jobs(1), "a")
        queue.add("second", jobs(1), caller)
        queue.ended(queue.take(), 8.0, 10.0)
        queue.add("third", jobs(1), "a")
        assert queue.start_at() == pytest.approx(expected)


def test_how_long_the_queue_takes_is_learnt_from_batches():
    queue = Batcher(MAX_BATCH, 0)
    queue.add("a", jobs(4))
    assert queue.drain_s() is None
    batch = queue.take()
    queue.ended(batch, 0.0, 2.0)
    queue.add("b", jobs(6))
    assert queue.drain_s() == pytest.approx(3.0)
    assert queue.drain_s(batch) == pytest.approx(5.0)
    queue.ended(queue.take(), 2.0, 8.0)  # 1.5 s a job: slower than before, and the newest counts for a quarter
    assert queue.drain_s() == pytest.approx(2 * 0.75)


def test_what_was_not_yet_run_is_expected_by_its_steps_and_pixels():
    queue, (job,) = Batcher(MAX_BATCH, 0), jobs(1)
    twice = dataclasses.replace(job, steps=2 * job.steps)
    queue.expect(job, 2.0)
    assert queue.takes_s([job, twice]) == pytest.approx(2.0 + 4.0)
    queue.add("a", [job])
    queue.ended(queue.take(), 0.0, 1.0)  # what was measured counts
    assert queue.takes_s([job, twice]) == pytest.approx(1.0 + 2.0)
    wide = dataclasses.replace(job, width=3 * job.width)
    assert queue.takes_s([wide]) == pytest.approx(3.0)


@dataclasses.dataclass
class Account:
    """A queue beside what must be true of it."""

    queue: Batcher = dataclasses.field(default_factory=lambda: Batcher(MAX_BATCH, 0))
    added: dict[int, list[Job]] = dataclasses.field(default_factory=dict)
    added_at: dict[int, int] = dataclasses.field(default_factory=dict)
    """How many batches had run."""
    gone: set[int] = dataclasses.field(default_factory=set)
    ran: list[list] = dataclasses.field(default_factory=list)

    def take(self) -> None:
        self.ran.append(self.queue.take())


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 9), st.sampled_from([1, 2, 4])),
        st.tuples(st.just("take")),
        st.tuples(st.just("drop"), st.integers(0, 20)),
    ),
    max_size=40,
)


def played(script) -> Account:
    account = Account()
    numbers = itertools.count()
    for kind, *rest in script:
        if kind == "add":
            name = next(numbers)
            account.added[name] = jobs(*rest)
            account.added_at[name] = len(account.ran)
            account.queue.add(name, account.added[name])
        elif kind == "take":
            account.take()
        else:
            account.queue.drop(rest[0])
            account.gone.add(rest[0])
    while len(account.queue):
        account.take()
    return account


@given(operations)
def test_no_job_is_lost_and_none_runs_twice(script):
    account = played(script)
    ran = [name for batch in account.ran for name in names(batch)]
    assert len(ran) == len(set(ran))
    owed = {(r, i) for r, own in account.added.items() if r not in account.gone for i in range(len(own))}
    assert owed <= set(ran)
    assert all(slot.job is account.added[slot.request][slot.index] for batch in account.ran for slot in batch)


@given(operations)
def test_a_batch_has_one_key_and_is_never_too_large(script):
    for batch in played(script).ran:
        assert len(batch) <= MAX_BATCH
        assert len({batch_key(slot.job) for slot in batch}) <= 1


@given(operations)
def test_jobs_of_one_shape_leave_in_order(script):
    """Of a request: in its own order. Of requests: first jobs in order of arrival."""
    account = played(script)
    for steps in (1, 2, 4):
        left = [name for batch in account.ran for name, slot in zip(names(batch), batch, strict=True)
                if slot.job.steps == steps]  # fmt: skip
        for request in account.added:
            own = [index for r, index in left if r == request]
            assert own == sorted(own)
        firsts = [r for r, index in left if index == 0]
        assert firsts == sorted(firsts)


@given(operations)
def test_a_wait_is_bounded_when_the_job_arrives(script):
    """While a job waits, batches start with lower places only, and of at most so many later requests."""
    account = played(script)
    for at, batch in enumerate(account.ran):
        for slot in batch:
            heads = [earlier[0] for earlier in account.ran[account.added_at[slot.request] : at] if earlier]
            assert all(head.place < slot.place for head in heads)
            assert len({head.request for head in heads if head.request > slot.request}) <= slot.index


@given(st.integers(1, 40), st.integers(1, 9))
def test_a_stream_of_newcomers_starves_nobody(newcomers, size):
    queue = Batcher(1, 0)
    queue.add("large", jobs(size))
    overtook = advanced = 0
    for newcomer in range(newcomers):
        queue.add(newcomer, jobs(1))
        (slot,) = queue.take()
        if slot.request == "large":
            assert overtook <= slot.index
            advanced += 1
        else:
            overtook += 1
    assert advanced >= min(size, newcomers // 2)
