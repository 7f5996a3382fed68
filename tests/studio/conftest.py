"""A studio in this process, as a client of the real server."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient
from visitor import ACCESS, TOKEN

from turbolens_studio.app import build_app
from turbolens_studio.connection import Connection


def pytest_terminal_summary(terminalreporter):
    """What the tests measured, for whoever reads their output."""
    passed = terminalreporter.stats.get("passed", ())
    figures = [value for report in passed for name, value in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("the studio's figures")
        terminalreporter.write_line("\n".join(figures))


@pytest.fixture(scope="module")
def page(server):
    """Someone who has the token."""
    app = build_app(Connection(server.target), ACCESS)
    with TestClient(app, base_url="http://localhost", headers={"authorization": f"Bearer {TOKEN}"}) as client:
        deadline = 50
        while client.get("/api/model").status_code == 503 and deadline:
            deadline -= 1
        yield client


@pytest.fixture(scope="module")
def chrome():
    """A real browser."""
    from browser import chromium
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def studio(server):
    """A studio over the real server."""
    from browser import Studio

    running = Studio(server.target)
    yield running
    running.close()


@pytest.fixture
def visit(chrome, studio):
    """A page at the painting screen's door, in a fresh profile; whatever it complains of fails the test."""
    from browser import visiting

    with visiting(chrome, studio) as visit:
        yield visit
        assert visit.problems == []
