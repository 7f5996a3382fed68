"""`turbolens replay`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from tyro.conf import Positional

import turbolens as tl
from turbolens._replay import TOLERANCE
from turbolens.cli.server import Calls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay(Calls):
    """Make a result again and say whether it is equal, equal within tolerance, or what differs; exit code 1 where it is
    neither.

    Example: turbolens replay picture.png
    """

    file: Positional[Path]
    """A PNG that TurboLens saved, or a manifest of `turbolens generate --manifest` or `extract --manifest`."""
    tolerance: int = TOLERANCE
    """Largest difference of a pixel, of 255, that counts as equal."""
    out: Path | None = None
    """File to write the new picture to."""

    def run(self) -> None:
        with self.connect() as lens:
            replay = lens.replay(self.file, tolerance=self.tolerance)
        if self.out is not None and isinstance(replay.made, tl.Picture):
            replay.made.save(self.out)
        told = {"verdict": replay.verdict, "detail": replay.detail, "differs": replay.differs}
        self.show(told, f"{self.file}: {replay}")
        if replay.verdict in ("different", "refused"):
            sys.stdout.flush()
            sys.exit(1)
