"""A fake server for the SDK's own tests; those of the whole product use the real one."""

from __future__ import annotations

import pytest
from fake_server import Running

import turbolens as tl


@pytest.fixture
def running():
    """A fake server over a real socket."""
    server = Running()
    yield server
    server.close()


@pytest.fixture
def fake(running):
    """Its servicer."""
    return running.fake


@pytest.fixture
def client(running):
    """A sync client of it."""
    with tl.connect(running.target, timeout=10) as connected:
        yield connected
