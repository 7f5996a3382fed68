"""Who may use the studio. A page on this machine is not private: any other page can send requests to it."""

from __future__ import annotations

import dataclasses
import hmac
from http.cookies import SimpleCookie
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_NO_TOKEN: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><title>TurboLens studio</title>
<h1>This address lacks its token</h1>
<p>Open the whole address that <code>turbolens studio</code> printed; it ends in <code>?token=...</code></p></html>"""


@dataclasses.dataclass(frozen=True)
class Access:
    """Whom to let in."""

    token: str
    hosts: frozenset[str]
    """Names, beside those of this machine, by which the studio may be asked for: else DNS could point any here."""
    cookie: str
    """Name of the cookie; it has the port in it, since ports of one host share cookies."""


class Guard:
    """ASGI middleware: checks host, origin and token of requests and of WebSockets, and sets the security headers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is None:
            await self._app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "refused"})
        else:
            await refusal(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        host = headers.get("host", "")
        if urlsplit(f"//{host}").hostname not in LOOPBACK | self._access.hosts:
            return PlainTextResponse(f"host {host[:80]!r} is not this studio's; see --allow-host", 421)
        if not self._origin_fits(headers, host):
            return PlainTextResponse("a page of another origin asks; refused", 403)
        if self._has_token(headers):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["type"] == "http" and self._same(dict(query).get("token", "")):
            return self._welcome(scope, query)
        return HTMLResponse(_NO_TOKEN, 401)

    def _origin_fits(self, headers: Headers, host: str) -> bool:
        origin = headers.get("origin")
        if origin is None:  # programs send none, and have the token; browsers always do where it matters
            return True
        parts = urlsplit(origin)
        return parts.netloc == host or parts.netloc in self._access.hosts

    def _has_token(self, headers: Headers) -> bool:
        cookies = SimpleCookie(headers.get("cookie", ""))
        cookie = cookies[self._access.cookie].value if self._access.cookie in cookies else ""
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        return self._same(cookie) or self._same(bearer)

    def _same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._access.token.encode())

    def _welcome(self, scope: Scope, query: list[tuple[str, str]]) -> ASGIApp:
        """Keep the token in a cookie that no script reads, and take it out of the address."""
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        # Relative, so that it holds under whatever path a proxy shows this at.
        last = scope["path"].rpartition("/")[2]
        answer = RedirectResponse(f"./{last}" + (f"?{rest}" if rest else ""), 303)
        answer.set_cookie(self._access.cookie, self._access.token, httponly=True, samesite="lax", path="/")
        return answer


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-cache")
        await send(message)

    return sending
