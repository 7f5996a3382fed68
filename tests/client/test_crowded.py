"""More calls at once than one connection takes: a client holds its own back, and asks again after others'."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socketserver
import threading
import time

import pytest

import turbolens as tl
from turbolens import _window

HEADERS, RESET, SETTINGS, PING = 1, 3, 4, 6
REFUSED_STREAM, ACKNOWLEDGES = 7, 1


class Held:
    """Answers that wait until they are let go, and how many wait."""

    def __init__(self, expected: int) -> None:
        self.now = 0
        self.full = threading.Event()
        self.go = threading.Event()
        self._expected = expected
        self._lock = threading.Lock()

    def __call__(self, context) -> None:
        with self._lock:
            self.now += 1
            if self.now >= self._expected:
                self.full.set()
        self.go.wait(60)


@pytest.mark.parametrize("kind", ["threads", "async"])
def test_a_client_holds_back_what_a_connection_would_not_take(running, fake, kind, monkeypatch):
    monkeypatch.setattr("turbolens._async.CALLS", 3)
    monkeypatch.setattr("turbolens._sync.CALLS", 3)
    fake.on["SearchFeatures"] = held = Held(3)

    async def ask_all() -> None:
        async with tl.aio.connect(running.target) as lens:
            await asyncio.gather(*(lens.search_features("x") for _ in range(7)))

    def ask_all_in_threads() -> None:
        with tl.connect(running.target) as lens, concurrent.futures.ThreadPoolExecutor(7) as pool:
            list(pool.map(lambda _: lens.search_features("x"), range(7)))

    asked = threading.Thread(target=ask_all_in_threads if kind == "threads" else lambda: asyncio.run(ask_all()))
    asked.start()
    assert held.full.wait(60)
    time.sleep(0.2)  # for one too many
    assert held.now == 3
    held.go.set()
    asked.join()
    assert held.now == 7


def test_a_connection_takes_more_than_one_clients_calls():
    assert _window.RUNS < _window.CALLS < 100  # the server's own bound


class Full(socketserver.StreamRequestHandler):
    """Speaks as much HTTP/2 as it takes to send every call back unread."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.rfile.read(24)  # what a client begins with
            self._send(SETTINGS, 0, 0, b"")
            while head := self.rfile.read(9):
                length, kind, flags, stream = int.from_bytes(head[:3]), head[3], head[4], int.from_bytes(head[5:])
                body = self.rfile.read(length)
                if kind in (SETTINGS, PING) and not flags & ACKNOWLEDGES:
                    self._send(kind, ACKNOWLEDGES, 0, body if kind == PING else b"")
                elif kind == HEADERS:
                    self.server.refused += 1
                    self._send(RESET, 0, stream, REFUSED_STREAM.to_bytes(4))

    def _send(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        self.wfile.write(len(body).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + body)


@pytest.fixture
def full():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Full) as server:
        server.daemon_threads, server.refused = True, 0
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


def test_calls_that_were_sent_back_unread_are_asked_again(full):
    target = f"127.0.0.1:{full.server_address[1]}"
    with tl.connect(target, attempts=1) as once, pytest.raises(tl.Overloaded, match="as many calls") as caught:
        once.search_features("x")
    assert caught.value.retry_after
    refused = full.refused
    with tl.connect(target, attempts=2) as twice, pytest.raises(tl.Overloaded, match="as many calls"):
        twice.search_features("x")
    assert full.refused - refused > 1.5 * refused
