"""A whole server inside this process, on a private socket: what `turbolens.connect("embedded")` talks to."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from turbolens_server.config import ServerConfig
from turbolens_server.logs import NAME
from turbolens_server.serving import Serving, load_from


class Embedded:
    """A running in-process server."""

    def __init__(self, config: ServerConfig) -> None:
        """Load the model and serve it; returns when it is ready.

        Raises:
            LoadError: the model or an SAE cannot be served.
        """
        engine = load_from(config)
        folder = tempfile.mkdtemp(prefix="turbolens-")  # readable by this user alone
        # Of a server that nobody closes, it goes with the server or at the interpreter's end.
        self._remove_folder = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.target = f"unix:{Path(folder) / 'socket'}"
        """gRPC target to connect to."""
        self._loop = asyncio.new_event_loop()
        self._serving: Serving | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="turbolens-embedded", daemon=True)
        self._thread.start()

        async def begin() -> Serving:
            serving = Serving(config)
            await serving.start(self.target)
            try:
                await serving.make_ready(engine)
            except BaseException:
                await serving.stop(0)
                raise
            return serving

        try:
            self._serving = asyncio.run_coroutine_threadsafe(begin(), self._loop).result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the server and remove its socket; a second call does nothing."""
        if self._loop.is_closed():
            return
        if self._serving is not None:
            asyncio.run_coroutine_threadsafe(self._serving.stop(0), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._remove_folder()

    def __enter__(self) -> Embedded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start(model: str = "mini", **settings: Any) -> Embedded:
    """Start a server in this process; `settings` are fields of :class:`ServerConfig`.

    Logging is the program's own: the server logs to the standard library's logger "turbolens", like any library.

    Raises:
        TypeError: a setting was given that is the process's own.
    """
    if taken := sorted(settings.keys() & {"log_format", "log_level", "traces"}):
        raise TypeError(
            f"{', '.join(taken)}: in this process, logging is set on logging.getLogger({NAME!r}), and traces go where "
            "OpenTelemetry's SDK sends them"
        )
    return Embedded(ServerConfig(model=model, **settings))
