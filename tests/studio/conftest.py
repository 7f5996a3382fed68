"""A studio in this process, as a client of the real server."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient
from visitor import ACCESS, TOKEN

from turbolens_studio.app import build_app
from turbolens_studio.connection import Connection


@pytest.fixture(scope="module")
def page(server):
    """Someone who has the token."""
    app = build_app(Connection(server.target), ACCESS)
    with TestClient(app, base_url="http://localhost", headers={"authorization": f"Bearer {TOKEN}"}) as client:
        deadline = 50
        while client.get("/api/model").status_code == 503 and deadline:
            deadline -= 1
        yield client
