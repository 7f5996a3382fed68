"""The studio's one connection to a server: lost and found again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Literal

import turbolens as tl

State = Literal["connecting", "ready", "lost"]
_RETRY_S: Final = 1.0
_ASK_S: Final = 5.0
"""A server that nobody has heard of for so long is asked whether it is there."""


class Connection:
    """A lens, and whether its server answers; `async with` opens and closes it."""

    def __init__(self, target: str, **settings: Any) -> None:
        """Of the server at `target`; `settings` are those of the embedded one."""
        self.target = target
        self._settings = settings
        self.state: State = "connecting"
        self.detail = ""
        """Why it is not ready, in words."""
        self.generation = 0
        """Rises whenever a server is found, which may not be the one from before."""
        self._lens: tl.aio.AsyncLens | None = None
        self._model: tl.Model | None = None
        self._heard = 0.0
        self._changed: set[Callable[[], None]] = set()
        self._minding: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    async def __aenter__(self) -> Connection:
        if self.target == "embedded":
            # Loading blocks, and there is no page yet that could wait for it.
            self._lens = tl.aio.connect(self.target, **self._settings)
            self._found(await self._lens.model())
        self._minding = asyncio.create_task(self._mind())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._minding is not None:
            self._minding.cancel()
        if self._lens is not None:
            await self._lens.close()

    @property
    def lens(self) -> tl.aio.AsyncLens:
        """The client.

        Raises:
            Unavailable: no server answers.
        """
        if self._lens is None or self.state != "ready":
            raise tl.Unavailable(self.detail or f"no server answers at {self.target} yet", code="UNAVAILABLE")
        return self._lens

    @property
    def model(self) -> tl.Model:
        """What is served.

        Raises:
            Unavailable: no server answers.
        """
        if self._model is None:
            raise tl.Unavailable(self.detail or f"no server answers at {self.target} yet", code="UNAVAILABLE")
        return self._model

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back whenever the state changes; returns what ends that."""
        self._changed.add(callback)
        return lambda: self._changed.discard(callback)

    def heard(self) -> None:
        """A call was answered."""
        self._heard = time.monotonic()

    def lost(self, error: tl.TurboLensError) -> None:
        """A call found no server: look for one from now on."""
        if self.state == "ready":
            self._set("lost", error.message)
            self._wake.set()

    def _set(self, state: State, detail: str = "") -> None:
        if (state, detail) != (self.state, self.detail):
            self.state, self.detail = state, detail
            for callback in list(self._changed):
                callback()

    def _found(self, model: tl.Model) -> None:
        self._model = model
        self.generation += 1
        self.heard()
        self._set("ready")

    async def _mind(self) -> None:
        while True:
            if self.state != "ready":
                await self._look()
            elif self._changed and time.monotonic() - self._heard > _ASK_S:
                await self._ask()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _RETRY_S)

    async def _look(self) -> None:
        """Try for a server; a new client, since the old one remembers the old server's model."""
        lens = self._lens if self.target == "embedded" and self._lens is not None else tl.aio.connect(self.target)
        try:
            model = await asyncio.wait_for(lens.model(), 5)
        except (tl.TurboLensError, TimeoutError) as error:
            if lens is not self._lens:
                await lens.close()
            self._set("lost" if self.generation else "connecting", str(error) or f"{self.target} does not answer")
            return
        if self._lens is not None and self._lens is not lens:
            await self._lens.close()
        self._lens = lens
        self._found(model)

    async def _ask(self) -> None:
        sae = self.model.saes[0].name if self.model.saes else "none"
        try:
            await self.lens.get_feature(sae, 0)
        except tl.Unavailable as error:
            self.lost(error)
        except tl.TurboLensError:
            pass  # an answer all the same
        self.heard()
