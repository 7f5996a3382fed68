"""`turbolens studio`."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Final

import tyro

TARGET_VARIABLE: Final = "TURBOLENS_TARGET"
PAGE_TOKEN_VARIABLE: Final = "TURBOLENS_STUDIO_TOKEN"
"""The token of the address, where it should be the same at every start."""
HOSTS_VARIABLE: Final = "TURBOLENS_STUDIO_HOSTS"
"""The same as --allow-host, with commas between."""
_MAX_MESSAGE_BYTES: Final = 8 * 2**20
"""Of one message from a page: the masks of many layers fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudioConfig:
    """Open the studio: explore, paint and compare in a browser.

    Prints one address with a token in it; whoever has that address can use the studio, and nobody else.

    Example: turbolens studio --embedded
    """

    server: str = dataclasses.field(default_factory=lambda: os.environ.get(TARGET_VARIABLE, "localhost:50051"))
    """`host:port` of a TurboLens server."""
    embedded: bool = False
    """Serve the embedded model in this process, in place of asking a server."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than this machine's own lets others in who have the token."""
    port: int = 0
    """Port to listen on; 0: any that is free."""
    open: bool = True
    """Open a browser."""
    allow_host: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Name by which a proxy in front is known, such as lens.example.org; may be repeated."""
    root_path: str = ""
    """Path that a proxy in front shows the studio below, such as /lens, where it leaves it on what it passes on."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}, expected 0 to 65535")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"root_path={self.root_path!r}, expected /NAME without a slash at the end")


def main(argv: list[str]) -> None:
    """Entry point: serve the page until told to stop."""
    try:
        config = tyro.cli(StudioConfig, args=argv, prog="turbolens studio")
        listening = _listen(config.host, config.port)
    except (ValueError, OSError) as error:
        sys.exit(f"turbolens studio: {error}")
    opened = False

    def end(sign: int, _: object = None) -> None:
        """Until there is something to end: at once, without waiting for imports or a model."""
        if not opened:
            os._exit(128 + sign)

    def on_open() -> None:
        nonlocal opened
        opened = True

    signal.signal(signal.SIGINT, end)
    try:
        asyncio.run(_serve(config, listening, on_open, end))
    except RuntimeError as error:
        sys.exit(f"turbolens studio: {error}")


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; IPv6 where the host is one of its addresses."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); is the port taken?") from error
    return listening


async def _serve(
    config: StudioConfig, listening: socket.socket, on_open: Callable[[], None], end: Callable[[int], None]
) -> None:
    # Imported late: a command's help must not wait for them.
    import uvicorn

    from turbolens_studio.app import build_app
    from turbolens_studio.connection import Connection
    from turbolens_studio.guard import Access

    token = os.environ.get(PAGE_TOKEN_VARIABLE) or secrets.token_urlsafe(18)
    port = listening.getsockname()[1]
    name = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{name}:{port}{config.root_path}/?token={token}"

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            end(sig)
            super().handle_exit(sig, frame)

    def on_ready() -> None:
        on_open()
        print(f"The studio is at {address}", flush=True)
        if config.open:
            asyncio.get_running_loop().call_later(0.5, webbrowser.open, address)

    if config.embedded:
        print("Loading the embedded model ...", flush=True)
    hosts = {config.host, *config.allow_host, *filter(None, os.environ.get(HOSTS_VARIABLE, "").split(","))}
    access = Access(token, frozenset(hosts), f"turbolens-studio-{port}")
    # The browser draws on the same cores: a picture that uses all of them waits for it at every operation.
    spare = max(1, (os.cpu_count() or 2) - 1)
    connection = Connection("embedded", threads=spare) if config.embedded else Connection(config.server)
    server = Server(
        uvicorn.Config(
            build_app(connection, access, on_ready, config.root_path),
            ws="websockets-sansio",
            ws_max_size=_MAX_MESSAGE_BYTES,
            ws_max_queue=4,
            ws_per_message_deflate=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=2,
        )
    )
    await server.serve(sockets=[listening])
