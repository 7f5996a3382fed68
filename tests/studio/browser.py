"""A studio behind a real socket, and pages of a real browser that look at it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator

import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page
from visitor import TOKEN

from turbolens_server.config import ServerConfig
from turbolens_server.serving import Serving
from turbolens_studio.app import build_app
from turbolens_studio.connection import Connection
from turbolens_studio.guard import Access


def chromium() -> str:
    """The system's Chromium; without it these tests fail, as they are asked for by name."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "no Chromium: apt-get install chromium"
    return found


class Server:
    """A TurboLens server on a port of this machine, which can go and come back."""

    def __init__(self, engine, port: int = 0) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._serving, self.port = self._run(self._start(engine, port))

    @staticmethod
    async def _start(engine, port: int) -> tuple[Serving, int]:
        serving = Serving(ServerConfig(warm_up=False))
        port = await serving.start(f"127.0.0.1:{port}")
        await serving.make_ready(engine)
        return serving, port

    def _run(self, of):
        return asyncio.run_coroutine_threadsafe(of, self._loop).result(60)

    def close(self) -> None:
        self._run(self._serving.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)


class Studio:
    """A studio that runs in a thread; its address, and its end."""

    def __init__(self, target: str) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        access = Access(TOKEN, frozenset({"127.0.0.1"}), f"turbolens-studio-{self.port}")
        ready = threading.Event()
        config = uvicorn.Config(
            build_app(Connection(target), access, ready.set), ws="websockets-sansio", ws_per_message_deflate=False,
            log_level="warning", timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._listening])), daemon=True)
        self._thread.start()
        assert ready.wait(60)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listening.close()


class Visit:
    """A page, with all that it said to the studio and heard of it."""

    def __init__(self, context: BrowserContext, studio: Studio, *, quiet: bool = True) -> None:
        self.page: Page = context.new_page()
        self.studio = studio
        self.sent: list[dict] = []
        self.heard: list[dict] = []
        self.order: list[dict] = []
        """Both, as they came."""
        self.problems: list[str] = []
        self.requested: list[str] = []
        self.page.on("websocket", self._listen)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.problems.append(m.text))
        self.page.on("request", lambda request: self.requested.append(request.url))

    def _listen(self, live) -> None:
        live.on("framesent", lambda text: self._note(self.sent, json.loads(text)))
        live.on("framereceived", lambda data: self._note(self.heard, self._header(data)))

    def _note(self, where: list[dict], message: dict) -> None:
        where.append(message)
        self.order.append(message)

    @staticmethod
    def _header(data: bytes) -> dict:
        (length,) = struct.unpack_from("<I", data)
        return {**json.loads(data[4 : 4 + length]), "at": time.monotonic()}

    def open(self, path: str = "explore", **query: str) -> Visit:
        """Go to a screen, with the token the first time."""
        from urllib.parse import urlencode

        self.page.goto(f"{self.studio.address}/{path}?{urlencode({**query, 'token': TOKEN})}")
        self.page.wait_for_selector("#main")
        return self

    def runs(self, lane: str = "paint") -> list[dict]:
        """Runs that were asked for."""
        return [run for m in self.sent if m["kind"] == "run" and m["lane"] == lane for run in m["runs"]]

    def pictures(self, lane: str = "paint") -> list[dict]:
        """Pictures that came."""
        return [h for h in self.heard if h["kind"] == "picture" and h["lane"] == lane]

    def until(self, true, why: str = "", seconds: float = 30) -> None:
        """Wait, with the page alive, until something holds."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, why or "it never came to hold"
            self.page.wait_for_timeout(20)

    def settle(self, lane: str = "paint") -> None:
        """Wait until all that was asked for in a lane was answered, and nothing more comes of it."""
        kinds = ("done", "cancelled", "error")

        def answered() -> bool:
            asked = [m["rev"] for m in self.sent if m["kind"] == "run" and m["lane"] == lane]
            done = {h["rev"] for h in self.heard if h["kind"] in kinds and h.get("lane") == lane}
            return bool(asked) and asked[-1] in done and not self.page.locator(".status.busy").count()

        asked = -1
        while asked != len(self.sent):
            asked = len(self.sent)
            self.page.wait_for_timeout(100)
            self.until(answered, f"lane {lane} is not answered")
            self.page.wait_for_timeout(100)

    def word(self, word: str) -> None:
        """Add a layer by a word, from the empty list."""
        self.page.get_by_role("button", name=word, exact=True).click()
        self.page.wait_for_selector("[data-layer]")
        self.settle()

    def stage(self, name: str = "plain") -> dict:
        """Where a canvas of the easel is."""
        box = self.page.locator(f".canvas.{name} canvas").bounding_box()
        assert box
        return box

    def drag(self, points: list[tuple[float, float]]) -> None:
        """A stroke of the mouse through points of the page."""
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*point)
        self.page.mouse.up()


@contextlib.contextmanager
def visiting(browser: Browser, studio: Studio, **options) -> Iterator[Visit]:
    """A page in a profile of its own."""
    context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
    try:
        yield Visit(context, studio)
    finally:
        context.close()
