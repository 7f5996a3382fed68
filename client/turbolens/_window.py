"""How much one client has under way: the rest waits here, where it costs the server nothing."""

from __future__ import annotations

import asyncio
import threading
from typing import Final

RUNS: Final = 32
"""Several batches' worth, and fewer than a server's queue holds: two such clients are not refused."""
CALLS: Final = 64
"""Fewer than the 100 that a server takes on one connection, with room for streams. gRPC itself keeps to that bound too,
but begins a call while the server still counts the one that it has just answered, which sends it back; where answers
are slow gRPC gives up on it (grpcio 1.85.3). More than runs, so that a question does not wait for pictures."""


def async_window(most: int) -> asyncio.Semaphore:
    """For the async client."""
    return asyncio.Semaphore(most)


def sync_window(most: int) -> threading.Semaphore:
    """For the sync client, whose threads share it."""
    return threading.Semaphore(most)
