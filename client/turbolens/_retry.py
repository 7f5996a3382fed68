"""When a call that was refused is worth another attempt, and what makes attempts the same call."""

from __future__ import annotations

import math
import random
import time
import uuid
import warnings
from typing import Any, Final

from turbolens._channel import client_version
from turbolens._errors import Overloaded, TurboLensError

ATTEMPTS: Final = 6
_JITTER: Final = 0.25
"""Of a wait that is added by chance, so that callers who were refused together do not come back together."""


class Attempts:
    """The attempts of one call, within its time."""

    def __init__(self, timeout: float, most: int) -> None:
        """`timeout` is in seconds, perhaps infinite; `most` attempts are made."""
        self._until = time.monotonic() + timeout
        self._left = most

    def left_s(self) -> float | None:
        """Seconds that the next attempt may take, as gRPC has them: None is no limit."""
        return None if self._until == math.inf else max(self._until - time.monotonic(), 0.001)

    def wait_s(self, error: TurboLensError) -> float | None:
        """Seconds until the next attempt; None where another would not help, or not in time."""
        self._left -= 1
        if not isinstance(error, Overloaded) or error.retry_after is None or self._left <= 0:
            return None
        wait = error.retry_after * (1 + _JITTER * random.random())  # no secret
        return wait if time.monotonic() + wait < self._until else None


def name_request(request: Any) -> None:
    """Give a request an id of its own: the server then knows a repeated one, and makes nothing twice."""
    if "request_id" in request.DESCRIPTOR.fields_by_name and not request.request_id:
        request.request_id = uuid.uuid4().hex


def warn_of_skew(server: str) -> None:
    """Warn where client and server are of different minor versions."""
    own = client_version()
    if own and server and own.split(".")[:2] != server.split(".")[:2]:
        warnings.warn(
            f"this is turbolens {own} and the server is {server}; what one knows and the other does not may fail",
            stacklevel=4,
        )
