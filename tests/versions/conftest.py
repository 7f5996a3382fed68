"""A real server: the one that `tools/versions.py` has started beside this environment, else one in this process."""

from __future__ import annotations

import os

import pytest

import turbolens as tl


@pytest.fixture(scope="session")
def target():
    if given := os.environ.get("TURBOLENS_VERSIONS_SERVER"):
        yield given
        return
    from turbolens_server.embedded import start

    with start() as running:
        yield running.target


@pytest.fixture(scope="session")
def lens(target):
    with tl.connect(target) as connected:
        yield connected
