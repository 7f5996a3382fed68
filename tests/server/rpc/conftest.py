"""A server over a real socket, on an engine without a model."""

from __future__ import annotations

import pytest
from fake_engine import FakeEngine
from serve import serve


@pytest.fixture
def fake():
    engine = FakeEngine()
    yield engine
    # A test that failed half-way must not leave a thread waiting.
    engine.gate.set()
    engine.decode_gate.set()


@pytest.fixture
async def loading(fake):
    """A server whose model is not there yet."""
    async with serve(fake, ready=False, max_queue=2) as running:
        yield running


@pytest.fixture
async def running(loading, fake):
    """A server that is ready."""
    await loading.serving.make_ready(fake)
    return loading
