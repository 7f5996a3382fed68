"""`connect("embedded")` finds its server by entry point, and closes it."""

from __future__ import annotations

import asyncio
import threading

import pytest
from fake_server import Running

import turbolens as tl
from turbolens import _embedded


@pytest.fixture
def started(monkeypatch):
    """What the entry point was called with, and the servers that it started."""
    calls: list[tuple[dict, Running]] = []

    def start(model="mini", **settings):
        server = Running()
        calls.append(({"model": model, **settings}, server))
        return server

    class EntryPoint:
        def load(self):
            return start

    def found(*, group, name):
        return [EntryPoint()] if (group, name) == ("turbolens.embedded", "server") else []

    monkeypatch.setattr(_embedded, "entry_points", found)
    return calls


def test_it_starts_with_its_settings_and_ends_with_the_client(started):
    with tl.connect("embedded", model="some/folder", max_queue=2) as client:
        assert client.generate("x", seed=3).seed == 3
        ((settings, server),) = started
        assert settings == {"model": "some/folder", "max_queue": 2}
        assert server.closed == 0
    client.close()
    assert server.closed == 1


def test_the_async_client_does_the_same(started):
    async def call():
        async with tl.aio.connect("embedded") as client:
            return (await client.generate("x", seed=3)).seed

    assert asyncio.run(call()) == 3
    assert started[0][0] == {"model": "mini"}
    assert started[0][1].closed == 1


def test_without_the_server_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_embedded, "entry_points", lambda **_: [])
    with pytest.raises(RuntimeError, match=r"pip install 'turbolens\[server\]'"):
        tl.connect("embedded")


def test_settings_are_for_embedded_servers_only():
    with pytest.raises(TypeError, match="model"):
        tl.connect("localhost:1", model="mini")


def test_a_server_in_this_process_has_no_tls(started):
    for connect in (tl.connect, tl.aio.connect):
        with pytest.raises(TypeError, match="tls"):
            connect("embedded", tls=tl.TLS())
    assert not started


def test_the_event_loop_goes_on_while_the_server_starts(monkeypatch):
    ticked = threading.Event()

    class EntryPoint:
        def load(self):
            return self.start

        @staticmethod
        def start():
            assert ticked.wait(30), "nothing else ran on the event loop"
            return Running()

    monkeypatch.setattr(_embedded, "entry_points", lambda **_: [EntryPoint()])

    async def call() -> int:
        asyncio.get_running_loop().call_later(0.01, ticked.set)
        async with tl.aio.connect("embedded") as lens:
            return (await lens.generate("x", seed=3)).seed

    assert asyncio.run(call()) == 3


def test_who_gives_up_while_the_server_starts_leaves_none_behind(started, monkeypatch):
    begun, go = threading.Event(), threading.Event()
    start = _embedded.Embedded.start

    def slow(self):
        begun.set()
        assert go.wait(30)
        return start(self)

    monkeypatch.setattr(_embedded.Embedded, "start", slow)

    async def give_up() -> None:
        async def enter() -> None:
            async with tl.aio.connect("embedded"):
                raise AssertionError

        task = asyncio.create_task(enter())
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert all(server.closed for _, server in started)


def test_one_server_is_started_for_calls_at_the_same_time(started):
    async def call() -> None:
        lens = tl.aio.connect("embedded")
        await asyncio.gather(*(lens.generate("x", seed=seed) for seed in range(3)))
        await lens.close()
        with pytest.raises(RuntimeError, match="closed"):
            await tl.aio.AsyncLens(lens._to, embedded=lens._embedded).model()

    asyncio.run(call())
    assert [server.closed for _, server in started] == [1]
