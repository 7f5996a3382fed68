"""How many pictures a caller may ask for: at once, and in a minute."""

from __future__ import annotations

import time
from collections.abc import Callable

from turbolens_server.rpc.errors import Violation, invalid, over_quota


class Quota:
    """One caller's. Belongs to one event loop."""

    def __init__(
        self,
        name: str,
        per_minute: int | None = None,
        in_flight: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """None: as many as it likes. A minute's pictures may be taken at once, and come back evenly."""
        self.name = name
        self.per_minute = per_minute
        self.most_in_flight = in_flight
        self.in_flight = 0
        self._clock = clock
        self._left = float(per_minute or 0)
        self._at = clock()

    def same_as(self, other: Quota | None) -> bool:
        """Whether another allows the same."""
        return other is not None and (self.per_minute, self.most_in_flight) == (other.per_minute, other.most_in_flight)

    def take(self, pictures: int) -> None:
        """Take pictures, until `give_back`.

        Raises:
            RpcError: RESOURCE_EXHAUSTED where there are not so many left; INVALID_ARGUMENT where there never will be.
        """
        for name, most in (("pictures_per_minute", self.per_minute), ("pictures_in_flight", self.most_in_flight)):
            if most is not None and pictures > most:
                text = f"got {pictures} pictures; {self.name} may have {most} by its quota {name}"
                raise invalid([Violation("run.seeds", text)])
        if self.most_in_flight is not None and self.in_flight + pictures > self.most_in_flight:
            raise over_quota(self.name, f"{self.in_flight} of {self.most_in_flight} pictures in flight", 1.0)
        if self.per_minute is not None:
            now = self._clock()
            self._left = min(self._left + (now - self._at) * self.per_minute / 60, float(self.per_minute))
            self._at = now
            if self._left < pictures:
                wait = (pictures - self._left) * 60 / self.per_minute
                raise over_quota(self.name, f"{self.per_minute} pictures a minute", wait)
            self._left -= pictures
        self.in_flight += pictures

    def give_back(self, pictures: int, *, used: bool = True) -> None:
        """So many are no longer in flight; those that were not used count for nothing."""
        self.in_flight -= pictures
        if self.per_minute is not None and not used:
            self._left = min(self._left + pictures, float(self.per_minute))
