"""`connect("embedded")` finds its server by entry point, and closes it."""

from __future__ import annotations

import asyncio

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
