"""How many runs one client has under way: the rest wait here, where they cost the server nothing."""

from __future__ import annotations

import asyncio
import threading
from typing import Final

MOST: Final = 32
"""Several batches' worth, and fewer than a server's queue holds: two such clients are not refused."""


def async_window() -> asyncio.Semaphore:
    """For the async client."""
    return asyncio.Semaphore(MOST)


def sync_window() -> threading.Semaphore:
    """For the sync client, whose threads share it."""
    return threading.Semaphore(MOST)
