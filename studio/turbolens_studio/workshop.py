"""Runs on the server, and the pictures that came of them: what was made once is not made again."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import time
from collections import OrderedDict, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

import turbolens as tl
from turbolens_studio.connection import Connection
from turbolens_studio.wire import Run

_KEPT_BYTES: Final = 256 * 2**20
Tell = Callable[[dict[str, Any], bytes], Awaitable[None]]
"""Told of what happens during a run: what, and a picture's PNG or nothing."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A picture and how it came about."""

    key: str
    """Of the run."""
    pixels: npt.NDArray[np.uint8]  # [height, width, 3]
    png: bytes
    name: str
    """By its pixels: equal pictures have one name."""
    features: tuple[tl.BlockFeatures, ...]
    """One for each SAE and step."""
    holds: frozenset[str]
    """Which features these are: "all", or each one that was asked for."""
    provenance: tl.Provenance
    warnings: tuple[tl.Warning, ...]
    batch_size: int
    server_ms: float
    """From asking the server until its picture was there."""

    def about(self) -> dict[str, Any]:
        """What a page needs to know beside the pixels."""
        return {
            "key": self.key,
            "name": self.name,
            "width": self.pixels.shape[1],
            "height": self.pixels.shape[0],
            "warnings": [dataclasses.asdict(warning) for warning in self.warnings],
            "batchSize": self.batch_size,
            "serverMs": round(self.server_ms, 2),
        }


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A lossless picture, coded for speed: it is looked at and sent no further than the next program."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


class Workshop:
    """Makes pictures through a connection and remembers them."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._kept: OrderedDict[str, Made] = OrderedDict()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """The same run asked for twice at once is made once: a batch may round otherwise than a picture alone."""
        self._bytes = 0
        self._generation = connection.generation

    def known(self, run: Run) -> Made | None:
        """The picture of a run that was made before, on the server that is there now, with the features asked for."""
        if self._generation != self.connection.generation:
            self._kept.clear()
            self._bytes, self._generation = 0, self.connection.generation
        made = self._kept.get(run.key)
        if made is None or run.previews or not ("all" in made.holds or _wants(run) <= made.holds):
            return None
        self._kept.move_to_end(run.key)
        return made

    async def make(self, run: Run, tell: Tell | None = None) -> Made:
        """The picture of a run.

        Raises:
            TurboLensError: the server refused it, or is lost.
        """
        async with self._locks[run.key]:
            made = self.known(run) or await self._make(run, tell)
        if not self._locks[run.key].locked():
            del self._locks[run.key]
        return made

    async def _make(self, run: Run, tell: Tell | None) -> Made:
        lens = self.connection.lens
        blocks: list[tl.BlockFeatures] = []
        picture: tl.Picture | None = None
        done: tl.Done | None = None
        began = time.perf_counter()
        ended = began
        wanted: dict[str, Any] = {"steps": run.steps, "steer": run.edits, "previews": run.previews, "format": "raw"}
        if run.only:
            wanted |= {"only": list(run.only), "float32": True}
        elif run.features:
            wanted |= {"features": True, "float32": True}
        # An asynchronous generator, which its type does not say.
        events = cast("AsyncGenerator[Any, None]", lens.stream_generate(run.prompt, seed=run.seed, **wanted))
        try:
            async with contextlib.aclosing(events) as stream:
                async for event in stream:
                    match event:
                        case tl.Queued(position=position):
                            if tell:
                                await tell({"kind": "queued", "position": position}, b"")
                        case tl.Step(step=step, steps=steps, preview=preview):
                            if tell:
                                png = b"" if preview is None else await asyncio.to_thread(encode_png, preview.array)
                                await tell({"kind": "step", "step": step, "steps": steps}, png)
                        case tl.Features(block=block):
                            blocks.append(block)
                        case tl.PictureReady(picture=ready):
                            picture, ended = ready, time.perf_counter()
                        case tl.Done():
                            done = event
        except tl.Unavailable as error:
            self.connection.lost(error)
            raise
        self.connection.heard()
        if picture is None or done is None:
            raise tl.TurboLensError("the server ended the run without a picture", code="INTERNAL")
        pixels = picture.array
        made = Made(
            run.key,
            pixels,
            await asyncio.to_thread(encode_png, pixels),
            hashlib.sha256(pixels.tobytes()).hexdigest()[:24],
            tuple(blocks),
            _wants(run),
            done.provenance,
            done.warnings,
            picture.batch_size,
            (ended - began) * 1000,
        )
        return self._keep(made)

    async def make_all(self, runs: Sequence[Run], at_once: int = 4) -> list[Made]:
        """The pictures of several runs, in order; those of one server batch run together."""
        room = asyncio.Semaphore(at_once)

        async def one(run: Run) -> Made:
            async with room:
                return await self.make(run)

        return list(await asyncio.gather(*map(one, runs)))

    def _keep(self, made: Made) -> Made:
        before = self._kept.pop(made.key, None)
        if before is not None:  # its pixels stay, so that one run has one picture; its features are more now
            self._bytes -= _size(before)
            made = dataclasses.replace(before, features=made.features, holds=made.holds)
        self._kept[made.key] = made
        self._bytes += _size(made)
        while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)
        return made


def _wants(run: Run) -> frozenset[str]:
    return frozenset(map(str, run.only)) if run.only else frozenset({"all"} if run.features else ())


def _size(made: Made) -> int:
    return made.pixels.nbytes + len(made.png) + sum(block.values.nbytes * 5 for block in made.features)
