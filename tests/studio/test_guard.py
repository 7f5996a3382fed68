"""Who gets in: the token, the host's name and the origin, on pages, calls and the socket."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from visitor import ACCESS, TOKEN

from turbolens_studio.app import build_app
from turbolens_studio.connection import Connection
from turbolens_studio.guard import Guard


async def _hello(request):
    return PlainTextResponse("hello")


async def _socket(socket):
    await socket.accept()
    await socket.send_text("hello")
    await socket.close()


@pytest.fixture
def stranger():
    app = Starlette(
        routes=[
            Route("/", _hello, methods=["GET", "POST"]),
            Route("/features/up.0.1/202", _hello),
            WebSocketRoute("/api/live", _socket),
        ],
        middleware=[Middleware(Guard, access=ACCESS)],
    )
    return TestClient(app, base_url="http://localhost:8000", follow_redirects=False)


BEARER = {"authorization": f"Bearer {TOKEN}"}


def test_without_the_token_there_is_a_page_that_says_so_and_nothing_else(stranger):
    answer = stranger.get("/")
    assert answer.status_code == 401
    assert "turbolens studio" in answer.text
    assert stranger.get("/?token=wrong").status_code == 401
    assert stranger.get("/", headers={"authorization": "Bearer wrong"}).status_code == 401


def test_the_token_moves_from_the_address_into_a_cookie_that_no_script_reads(stranger):
    answer = stranger.get(f"/features/up.0.1/202?seed=7&token={TOKEN}")
    assert answer.status_code == 303
    assert answer.headers["location"] == "./202?seed=7"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert stranger.get("/").text == "hello"  # by the cookie


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:1", "[::1]:8000", "lens.example.org"])
def test_names_of_this_machine_and_those_allowed_are_answered(stranger, host):
    assert stranger.get("/", headers={**BEARER, "host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example.org", "localhost.evil.org", "", "127.0.0.1.nip.io:8000"])
def test_other_names_are_refused_whatever_else_fits(stranger, host):
    """A name of another's may point here by DNS, and its pages then count as of this origin."""
    assert stranger.get("/", headers={**BEARER, "host": host}).status_code == 421


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("https://lens.example.org", 200),
        ("http://localhost:3000", 403),  # another program of this machine
        ("https://evil.example.org", 403),
        ("null", 403),
    ],
)
def test_calls_of_another_origin_are_refused(stranger, origin, status):
    assert stranger.post("/", headers={**BEARER, "origin": origin}).status_code == status


def test_the_socket_is_held_to_the_same(stranger):
    fits = {**BEARER, "host": "localhost:8000"}
    with stranger.websocket_connect("/api/live", headers=fits) as socket:
        assert socket.receive_text() == "hello"
    wrong = ({"authorization": ""}, {"origin": "https://evil.example.org"}, {"host": "evil.example.org"})
    for headers in ({**fits, **one} for one in wrong):
        with pytest.raises(WebSocketDisconnect), stranger.websocket_connect("/api/live", headers=headers):
            pass


def test_every_answer_carries_the_rules_for_the_browser(stranger):
    for headers in ({}, BEARER):
        rules = stranger.get("/", headers=headers).headers
        policy = rules["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert rules["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("below", "path", "base"),
    [
        ("", "/", "./"),
        ("", "/features/up.0.1/202", "../../"),
        ("/lens", "/lens/explore", "./"),
        ("/a/b", "/a/b/features/up.0.1/202", "../../"),
    ],
)
def test_the_page_finds_its_own_files_wherever_it_is_shown(below, path, base):
    """Without a server to be a client of: the page is there before one is."""
    visitor = TestClient(build_app(Connection("localhost:1"), ACCESS, below=below), base_url="http://localhost:8000")
    page = visitor.get(path, headers=BEARER).text
    assert f'<base href="{base}">' in page
    assert visitor.get(f"{below}/static/studio.js", headers=BEARER).status_code == 200
    assert visitor.get(f"{below}/api/model", headers=BEARER).status_code == 503
