"""The studio's addresses: the page, what it asks for, and the socket over which runs go."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from google.protobuf import json_format
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

import turbolens as tl
from turbolens_studio import compare, exports, uploads
from turbolens_studio.connection import Connection
from turbolens_studio.features import Atlas, Wanted, brief, whole
from turbolens_studio.guard import Access, Guard
from turbolens_studio.sample import Sample
from turbolens_studio.session import Session
from turbolens_studio.wire import BadRun, Run, error_json
from turbolens_studio.workshop import Made, Workshop, encode_png

STATIC: Final = Path(__file__).parent / "static"
SCREENS: Final = ("", "explore", "features", "features/{sae}/{index:int}", "paint", "compare", "history")
_STATUS: Final = {"NOT_FOUND": 404, "UNAVAILABLE": 503, "RESOURCE_EXHAUSTED": 429, "INTERNAL": 500}
log = logging.getLogger("turbolens.studio")
Handler = Callable[[Request], Awaitable[Response]]


class Studio:
    """What the addresses do."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.workshop = Workshop(connection)
        self.atlas = Atlas(self.workshop)
        self.sample = Sample(connection, self.atlas)
        self._page = (STATIC / "index.html").read_text(encoding="utf-8")

    async def page(self, request: Request) -> Response:
        """The page; it is one for all screens, and its addresses are relative to where it is shown."""
        depth = request.scope["path"].removeprefix(request.scope.get("root_path", "")).count("/") - 1
        return HTMLResponse(self._page.replace('<base href="./"', f'<base href="{"../" * depth or "./"}"'))

    async def model(self, request: Request) -> Response:
        """What is served, in the contract's JSON."""
        return JSONResponse(
            json_format.MessageToDict(self.connection.model.message, always_print_fields_with_no_presence=True)
        )

    async def features(self, request: Request) -> Response:
        """Features by words and filters."""
        query = request.query_params
        wanted = Wanted(
            words=query.get("q", ""),
            block=query.get("block", ""),
            attribute=query.get("attribute", ""),
            least_frequency=float(query.get("least", 0)),
            most_frequency=float(query.get("most", 1)),
            least_score=float(query.get("score", 0)),
            sort=query.get("sort", "best"),  # type: ignore[arg-type]  # checked where it is made
            start=int(query.get("start", 0)),
            count=int(query.get("count", 48)),
        )
        return JSONResponse(await self.atlas.listing(wanted))

    async def feature(self, request: Request) -> Response:
        """All that is known of one feature."""
        return JSONResponse(whole(await self.connection.lens.get_feature(_ref(request))))

    async def thumb(self, request: Request) -> Response:
        """Where a feature fires, small."""
        data = await self.atlas.thumb(_ref(request))
        return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=600"})

    async def sampled(self, request: Request) -> Response:
        """What a sample of runs says of a feature."""
        return JSONResponse(await self.sample.of(_ref(request)))

    async def nearest(self, request: Request) -> Response:
        """The features that write most alike."""
        near = await self.connection.lens.nearest_features(_ref(request), limit=12)
        return JSONResponse({"features": [brief(one.feature) | {"cosine": one.cosine} for one in near]})

    async def contrast(self, request: Request) -> Response:
        """The features that tell a region of a picture from the rest."""
        asked = await _asked(request)
        run, region = Run.from_json(asked.get("run")), compare.read_mask(str(asked.get("region")))
        return JSONResponse({"features": await self.atlas.contrast(run, region)})

    async def compared(self, request: Request) -> Response:
        """Two runs in numbers."""
        asked = await _asked(request)
        a, b = await self._two(asked)
        mask = compare.read_mask(asked["mask"]) if isinstance(asked.get("mask"), str) else None
        return JSONResponse(compare.numbers(a.pixels, b.pixels, mask))

    async def difference(self, request: Request) -> Response:
        """Two runs' difference as a PNG."""
        asked = await _asked(request)
        a, b = await self._two(asked)
        gain = asked.get("gain", 1)
        if not isinstance(gain, int) or not 1 <= gain <= 64:
            raise BadRun("gain", f"got {gain!r}, expected 1 to 64")
        return Response(encode_png(compare.difference(a.pixels, b.pixels, gain)), media_type="image/png")

    async def export(self, request: Request) -> Response:
        """A run as a file: png, json, yaml, python or zip."""
        asked = await _asked(request)
        run, kind = Run.from_json(asked.get("run")), asked.get("as")
        if kind == "json":
            return Response(exports.as_json(run), media_type="application/json")
        if kind == "yaml":
            return Response(exports.as_yaml(run), media_type="application/yaml")
        if kind == "python":
            return Response(exports.as_python(run, self.connection.target), media_type="text/x-python")
        if kind not in ("png", "zip"):
            raise BadRun("as", f"got {kind!r}, expected png, zip, json, yaml or python")
        made = await self.workshop.make(run)
        if kind == "png":
            return Response(exports.as_png(made), media_type="image/png")
        before = await self.workshop.make(Run(run.prompt, run.seed, run.steps))
        return Response(exports.as_zip(run, made, before, self.connection.target), media_type="application/zip")

    async def opened(self, request: Request) -> Response:
        """The settings in a file that the studio once wrote."""
        return JSONResponse(exports.read_any(await _body(request)))

    async def mask(self, request: Request) -> Response:
        """A picture of any kind as a mask of the served size: a grey PNG."""
        size = self.connection.model.defaults
        picture = uploads.read_picture(await _body(request))
        mask = uploads.as_mask(picture, size.width, size.height)
        return Response(encode_png(mask), media_type="image/png")

    async def live(self, socket: WebSocket) -> None:
        """Runs, and news of the server."""
        await Session(socket, self.connection, self.workshop, self.atlas).serve()

    async def _two(self, asked: dict[str, Any]) -> tuple[Made, Made]:
        first, second = await self.workshop.make_all([Run.from_json(asked.get("a")), Run.from_json(asked.get("b"))])
        return first, second


def build_app(
    connection: Connection, access: Access, on_ready: Callable[[], None] = lambda: None, below: str = ""
) -> Starlette:
    """The studio as an ASGI application; it opens the connection when it starts, and closes it at its end.

    Args:
        connection: not yet open.
        access: whom to let in.
        on_ready: called once it can be used.
        below: the path that all of its addresses begin with, such as /lens.
    """
    studio = Studio(connection)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with connection:
            on_ready()
            yield

    def told(handler: Handler) -> Handler:
        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except tl.Unavailable as error:
                connection.lost(error)
                return _refused(error)
            except (tl.TurboLensError, ValueError, TypeError, IndexError) as error:
                return _refused(error)

        return answer

    routes: list[BaseRoute] = [
        *(Route(f"/{screen}", studio.page) for screen in SCREENS),
        Route("/api/model", told(studio.model)),
        Route("/api/features", told(studio.features)),
        Route("/api/features/{sae}/{index:int}", told(studio.feature)),
        Route("/api/thumbs/{sae}/{index:int}", told(studio.thumb)),
        Route("/api/sampled/{sae}/{index:int}", told(studio.sampled)),
        Route("/api/nearest/{sae}/{index:int}", told(studio.nearest)),
        Route("/api/contrast", told(studio.contrast), methods=["POST"]),
        Route("/api/compare", told(studio.compared), methods=["POST"]),
        Route("/api/difference", told(studio.difference), methods=["POST"]),
        Route("/api/export", told(studio.export), methods=["POST"]),
        Route("/api/open", told(studio.opened), methods=["POST"]),
        Route("/api/mask", told(studio.mask), methods=["POST"]),
        WebSocketRoute("/api/live", studio.live),
        Mount("/static", StaticFiles(directory=STATIC), middleware=[Middleware(GZipMiddleware, minimum_size=500)]),
    ]
    if below:
        routes = [Mount(below, routes=routes)]
    return Starlette(routes=routes, middleware=[Middleware(Guard, access=access)], lifespan=lifespan)


def _refused(error: Exception) -> Response:
    told = error_json(error)
    return JSONResponse({"error": told}, _STATUS.get(told["code"], 400))


def _ref(request: Request) -> tl.FeatureRef:
    return tl.feature(request.path_params["sae"], request.path_params["index"])


async def _asked(request: Request) -> dict[str, Any]:
    asked = await request.json()
    if not isinstance(asked, dict):
        raise BadRun("request", "is no object")
    return asked


async def _body(request: Request) -> bytes:
    """A file, up to the size that is read; more is refused while it comes."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > uploads.MAX_BYTES:
            raise ValueError(f"more than {uploads.MAX_BYTES:,} bytes")
    return bytes(data)
