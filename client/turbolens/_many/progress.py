"""How far a long run is."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a run of many prompts is."""

    done: int
    """Prompts, those of an earlier run included."""
    total: int | None
    """None: not known before the last one is read."""
    failed: int
    seconds: float
    """Of this run."""
    resumed: int
    """Of `done`, those of an earlier run."""

    def __str__(self) -> str:
        rate = (self.done - self.resumed) / max(self.seconds, 1e-9)
        parts = [f"{self.done:,}" + ("" if self.total is None else f" of {self.total:,}"), f"{rate:.1f}/s"]
        if self.total is not None and rate:
            parts.append(f"{(self.total - self.done) / rate:,.0f} s left")
        return "  ".join(parts + ([f"{self.failed:,} failed"] if self.failed else []))


@dataclasses.dataclass(frozen=True, slots=True)
class ManyReport:
    """What a run of many prompts came to."""

    out: Path
    done: int
    """Prompts in the output, failed ones included."""
    failed: int
    """Prompts that the server refused or could not make; the output says why."""
    resumed: int
    """Prompts that an earlier run had done."""
    seconds: float


Show = Callable[[Progress], None] | bool | None
"""Who is told of progress; True: a line on stderr; None: that, where it is a terminal."""


class Meter:
    """Tells of progress, not too often."""

    def __init__(self, show: Show, total: int | None, done: int, failed: int) -> None:
        self._terminal = sys.stderr.isatty()
        wanted = self._terminal if show is None else show
        self._show = self._line if wanted is True else wanted or (lambda _: None)
        self._every_s = 0.0 if callable(show) else 0.2 if self._terminal else 10.0
        self._start = self._told = time.monotonic()
        self._total, self.resumed, self.done, self.failed = total, done, done, failed

    def add(self, *, failed: bool) -> None:
        """One more prompt is done."""
        self.done += 1
        self.failed += failed
        if time.monotonic() - self._told >= self._every_s:
            self._tell()

    def end(self, out: Path) -> ManyReport:
        """The last word."""
        if self.done > self.resumed:
            self._tell()
            if self._show == self._line and self._terminal:
                print(file=sys.stderr)
        return ManyReport(out, self.done, self.failed, self.resumed, self._seconds())

    def _tell(self) -> None:
        self._told = time.monotonic()
        self._show(Progress(self.done, self._total, self.failed, self._seconds(), self.resumed))

    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _line(self, progress: Progress) -> None:
        print(f"\r{progress}\x1b[K" if self._terminal else str(progress), end="" if self._terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip
