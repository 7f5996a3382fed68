"""The in-process server, found without importing it: the SDK knows only the name of an entry point."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, Final, Protocol

GROUP: Final = "turbolens.embedded"


class EmbeddedServer(Protocol):
    """What the entry point returns."""

    target: str

    def close(self) -> None:
        """Stop the server."""
        ...


def start_embedded(settings: dict[str, Any]) -> EmbeddedServer:
    """Start a server in this process.

    Raises:
        RuntimeError: the server is not installed.
    """
    found = list(entry_points(group=GROUP, name="server"))
    if not found:
        raise RuntimeError("there is no server to embed; install it with: pip install 'turbolens[server]'")
    server: EmbeddedServer = found[0].load()(**settings)
    return server
