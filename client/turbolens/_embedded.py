"""The in-process server, found without importing it: the SDK knows only the name of an entry point."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Final, Protocol

GROUP: Final = "turbolens.embedded"
_WAY_OUT: Final = "install it with: pip install 'turbolens[server]'"


class EmbeddedServer(Protocol):
    """What the entry point returns."""

    target: str

    def close(self) -> None:
        """Stop the server."""
        ...


class Embedded:
    """A server in this process: started once, when it is first needed, by any thread."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Find the server; `settings` are what it will start with.

        Raises:
            RuntimeError: the server is not installed.
        """
        found = list(entry_points(group=GROUP, name="server"))
        if not found:
            raise RuntimeError(f"there is no server to embed; {_WAY_OUT}")
        self._entry_point = found[0]
        self._settings = settings
        self._lock = threading.Lock()
        self._server: EmbeddedServer | None = None
        self._closed = False

    def start(self) -> str:
        """The server's target; loads the model the first time.

        Raises:
            RuntimeError: it was closed, or something that it runs on is not installed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("this connection is closed")
            if self._server is None:
                self._server = self._load()(**self._settings)
            return self._server.target

    def _load(self) -> Callable[..., EmbeddedServer]:
        try:
            start: Callable[..., EmbeddedServer] = self._entry_point.load()
        except ModuleNotFoundError as error:
            if (error.name or "turbolens").startswith("turbolens"):
                raise
            raise RuntimeError(f"the server needs {error.name}, which is not installed; {_WAY_OUT}") from None
        return start

    def close(self) -> None:
        """Stop the server, after its start where that is under way; a second call does nothing."""
        with self._lock:
            self._closed = True
            if self._server is not None:
                self._server.close()
                self._server = None
